"""Reading one HTTP request and writing its answer: limits, errors, disconnects, server-sent events."""

import asyncio
import json
import re
import secrets
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, Generic, TypeVar

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.limits import (
    MAX_HEADER_BYTES,
    MAX_HEADERS,
    MAX_JSON_DEPTH,
    MAX_REQUEST_ID_CHARS,
    MAX_URL_BYTES,
)
from gateway.patience import Patience
from runtime.admin_http import json_response
from runtime.errors import Cancelled, Internal, InvalidRequest, NotFound, PayloadTooLarge, TandemError
from runtime.http_parts import PARTS, PartWriter

T = TypeVar("T")

BODY_TIMEOUT_S = 10.0
"""A body that takes longer to arrive is refused."""

TIMEOUT_HEADER = "x-request-timeout"
"""HTTP's counterpart of a gRPC deadline."""

REQUEST_ID = re.compile(rf"[!-~]{{1,{MAX_REQUEST_ID_CHARS}}}")

BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*+"?|[][{}]', re.DOTALL)
"""Of JSON; strings, which may hold brackets, are matched as a whole, without backtracking."""

ERROR_TYPES = {400: "invalid_request_error", 404: "not_found_error", 413: "invalid_request_error"} | {
    409: "invalid_request_error",
    429: "rate_limit_error",
}


def error_body(error: TandemError) -> dict[str, Any]:
    """OpenAI's error object; `param` is the field, `code` the machine-readable reason."""
    code = error.reason.lower()
    if isinstance(error, NotFound) and error.field == "model":
        code = "model_not_found"
    return {
        "error": {
            "message": error.message,
            "type": ERROR_TYPES.get(error.http_status, "server_error"),
            "param": error.field,
            "code": code,
        }
    }


def error_response(error: TandemError) -> Response:
    """An error before the first byte of an answer."""
    headers = {}
    if error.http_status in (429, 503):
        headers["retry-after"] = str(max(1, round(error.retry_after_s or 1.0)))
    if isinstance(error, PayloadTooLarge):
        headers["connection"] = "close"  # the rest of the body is not read
    return json_response(error_body(error), error.http_status, headers)


async def read_json(request: Request, max_bytes: int) -> dict[str, Any]:
    """The body as a JSON object, refused as soon as it is too large or takes too long."""
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > max_bytes:
        raise PayloadTooLarge(f"the body must have at most {max_bytes} bytes")
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            raw = await _read(request, max_bytes)
    except TimeoutError:
        raise InvalidRequest("the body did not arrive in time") from None
    except ClientDisconnect:
        raise Cancelled("the client went away") from None
    _check_depth(raw)
    body = _parse(raw)
    if not isinstance(body, dict):
        raise InvalidRequest("the body must be a JSON object")
    return body


def _check_depth(raw: bytes) -> None:
    """Before it is parsed, for parsers recurse. Few bodies have enough brackets to be looked at closely."""
    if raw.count(b"[") + raw.count(b"{") <= MAX_JSON_DEPTH:
        return
    depth = 0
    for bracket in BRACKETS.finditer(raw):
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(bracket[0], 0)
        if depth > MAX_JSON_DEPTH:
            raise InvalidRequest(f"the body must be at most {MAX_JSON_DEPTH} arrays and objects deep")


def _parse(raw: bytes) -> Any:
    """JSON; NaN and Infinity, which JSON does not have, are let through so that the check of their field
    can name it."""
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        fault = InvalidRequest(f"the body is not valid JSON: {error}")
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        raise fault from None


async def _read(request: Request, max_bytes: int) -> bytes:
    raw = bytearray()
    async for part in request.stream():
        raw += part
        if len(raw) > max_bytes:
            raise PayloadTooLarge(f"the body must have at most {max_bytes} bytes")
    return bytes(raw)


def request_id_of(request: Request, from_body: str | None) -> str:
    """The client's id of the request, from header or body, else a new one."""
    given = request.headers.get("x-request-id") or from_body or ""
    if REQUEST_ID.fullmatch(given):
        return given
    new: str = request.scope["tandem.request_id"]
    return new


def timeout_of(request: Request) -> float:
    """Seconds that the client gives the request, from the header; infinite without one."""
    given = request.headers.get(TIMEOUT_HEADER)
    if given is None:
        return float("inf")
    try:
        timeout_s = float(given)
    except ValueError:
        timeout_s = float("nan")
    if not 0 < timeout_s < float("inf"):
        raise InvalidRequest(
            f"{TIMEOUT_HEADER} must be a positive number of seconds, got {given!r}", field=TIMEOUT_HEADER
        )
    return timeout_s


def with_request_id(app: ASGIApp) -> ASGIApp:
    """Echo X-Request-Id, or the id that was drawn, on every answer; refuse overlong headers."""

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await app(scope, receive, send)
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(16)
        scope["tandem.request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        refusal = _too_large(scope)
        if refusal is not None:
            return await refusal(scope, receive, send_with_id)
        return await app(scope, receive, send_with_id)

    return wrapped


def _too_large(scope: Scope) -> Response | None:
    """The answer to a request whose head is over a limit."""
    headers = scope["headers"]
    if len(scope["raw_path"]) + len(scope["query_string"]) > MAX_URL_BYTES:
        status, message = 414, f"the URL must have at most {MAX_URL_BYTES} bytes"
    elif len(headers) > MAX_HEADERS:
        status, message = 431, f"at most {MAX_HEADERS} headers"
    elif sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
        status, message = 431, f"the headers must have at most {MAX_HEADER_BYTES} bytes"
    else:
        return None
    body = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return json_response({"error": body}, status, {"connection": "close"})


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do the work unless the client goes away first: then cancel it and raise Cancelled."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Cancelled("the client went away")
        return task.result()
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.wait({task, gone})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def sse(body: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + orjson.dumps(body) + b"\n\n"


class EventStream(Response, Generic[T]):
    """Server-sent events made of what a generator yields, which is closed as soon as the client goes away.

    The status line waits for the first event, so that an error before it is a plain error answer. A later
    error is one `data: {"error": ...}` event and the end of the stream.
    """

    def __init__(self, items: AsyncGenerator[T, None], events: Callable[[T], bytes], last: bytes) -> None:
        """`events` makes the events of an item, perhaps none; `last` is the one behind all."""
        self._items, self._events, self._last = items, events, last
        self._started = False
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything, or stop when the client is gone."""
        try:
            await until_disconnect(receive, self._send_all(scope, receive, send))
        except Cancelled:
            pass  # nobody is left to tell

    async def _send_all(self, scope: Scope, receive: Receive, send: Send) -> None:
        parts: PartWriter = scope[PARTS]
        with Patience() as patience:
            try:
                await self._send_events(parts, send, patience)
            except asyncio.CancelledError:
                if not patience.is_over:
                    raise
                raise Cancelled("the client does not read") from None
            except TandemError as error:
                patience.begin()
                if not self._started:
                    await error_response(error)(scope, receive, send)
                    return
                await _send_part(parts, sse(error_body(error)), patience)
            except Exception:
                if self._started:
                    await _send_part(parts, sse(error_body(Internal("internal error"))), patience)
                raise
            patience.begin()
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_events(self, parts: PartWriter, send: Send, patience: Patience) -> None:
        async with aclosing(self._items):
            async for item in self._items:
                events = self._events(item)
                if not events:
                    continue
                if not self._started:
                    await self._start(send, patience)
                if parts.is_full:
                    await _wait(parts, patience)
                parts.write(events)
        if not self._started:
            await self._start(send, patience)
        await _send_part(parts, self._last, patience)

    async def _start(self, send: Send, patience: Patience) -> None:
        self._started = True
        patience.begin()
        await send({"type": "http.response.start", "status": 200, "headers": SSE_HEADERS})
        patience.end()


async def _send_part(parts: PartWriter, part: bytes, patience: Patience) -> None:
    if parts.is_full:
        await _wait(parts, patience)
    parts.write(part)


async def _wait(parts: PartWriter, patience: Patience) -> None:
    patience.begin()
    await parts.drained()
    patience.end()


SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
