"""Gateway processes that share the public ports, and so must answer for one another.

Each listens on a socket of its own in one directory that nobody else may enter, and finds the others there. A
client's call reaches any of them: the one that it reaches asks the others for their metrics, their state, and
whether they have the request that is to be aborted. One that does not answer is left out.
"""

import asyncio
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.merge import merged_metrics, merged_state
from runtime.admin_http import HttpServer, admin_routes, json_response
from runtime.metrics import exposition

ASK_TIMEOUT_S = 2.0
"""A process that takes longer is left out."""

Abort = Callable[[list[str], str], list[str]]
"""(request ids, tenant) -> those of them that were live and are ended."""


class Peers:
    """The other processes, and this one's socket among theirs; without a directory there are none."""

    def __init__(
        self,
        directory: str,
        name: str,
        registry: CollectorRegistry,
        state: Callable[[], dict[str, Any]],
        abort: Abort,
    ) -> None:
        self._own = Path(directory) / f"{name}.sock" if directory else None
        self._registry = registry
        self._state = state
        self._abort = abort
        abort_route = Route("/abort", self._serve_abort, methods=["POST"])
        self._server = HttpServer(
            Starlette(routes=[*admin_routes(registry, state, lambda: None), abort_route])
        )

    async def serve(self) -> None:
        """Answer the others until `close`; returns at once without a directory."""
        if self._own is None:
            return
        listening = _listen(self._own)
        try:
            await self._server.serve(sockets=[listening])
        finally:
            self._own.unlink(missing_ok=True)

    def close(self) -> None:
        """Stop to answer."""
        self._server.should_exit = True

    def routes(self) -> list[Route]:
        """/metrics and /debug/state of all processes as one."""

        async def metrics(request: Request) -> Response:
            body, content_type = await self.metrics(request.headers.get("accept", ""))
            return Response(body, headers={"content-type": content_type})

        async def debug_state(_: Request) -> Response:
            return json_response(await self.state())

        return [Route("/metrics", metrics), Route("/debug/state", debug_state)]

    async def metrics(self, accept: str) -> tuple[bytes, str]:
        """Body and content type of everybody's /metrics."""
        pages = [response.text for response in await self._ask("GET", "/metrics")]
        if not pages:
            return exposition(self._registry, accept)
        own, _ = exposition(self._registry, "")
        return exposition(merged_metrics([own.decode(), *pages]), accept)

    async def state(self) -> dict[str, Any]:
        """Everybody's /debug/state as one."""
        others = [response.json() for response in await self._ask("GET", "/debug/state")]
        return merged_state([self._state(), *others]) if others else self._state()

    async def abort(self, request_ids: list[str], tenant: str) -> list[str]:
        """End live requests wherever they are; returns those that were live."""
        found = self._abort(request_ids, tenant)
        asked = {"request_ids": request_ids, "tenant": tenant}
        for response in await self._ask("POST", "/abort", asked):
            found += response.json()["aborted"]
        return found

    async def _serve_abort(self, request: Request) -> Response:
        asked = await request.json()
        return json_response({"aborted": self._abort(asked["request_ids"], asked["tenant"])})

    async def _ask(self, method: str, path: str, body: Any = None) -> list[httpx.Response]:
        if self._own is None:
            return []
        others = sorted(path for path in self._own.parent.glob("*.sock") if path != self._own)
        answers = await asyncio.gather(*(_ask_one(other, method, path, body) for other in others))
        return [answer for answer in answers if answer is not None]


async def _ask_one(other: Path, method: str, path: str, body: Any) -> httpx.Response | None:
    transport = httpx.AsyncHTTPTransport(uds=str(other))
    try:
        async with httpx.AsyncClient(transport=transport, timeout=ASK_TIMEOUT_S) as client:
            response = await client.request(method, f"http://gateway{path}", json=body)
    except httpx.ConnectError:
        _forget(other)
        return None
    except httpx.HTTPError:
        return None
    return response if response.is_success else None


def _forget(dead: Path) -> None:
    """Nobody listens there any more: a socket listens before it gets its name."""
    dead.unlink(missing_ok=True)


def _listen(path: Path) -> socket.socket:
    """A listening socket of that name."""
    nascent = path.with_suffix(".new")
    nascent.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(str(nascent))
    listening.listen(64)
    listening.setblocking(False)
    os.rename(nascent, path)
    return listening
