"""Keys for HTTP, for a whole application: judged on the path that routes, before anything is routed.

| path | needs |
|---|---|
| /health, /ready | nothing |
| /metrics, /debug/state | the admin key, or to come from this machine |
| every other one, whether it exists or not | an API key, if there are any |
"""

import re

import orjson
from starlette.types import ASGIApp, Receive, Scope, Send

from runtime.access import Keys, is_loopback
from runtime.errors import InvalidRequest, TandemError, Unauthenticated

OPEN_PATHS = frozenset({"/health", "/ready"})

ADMIN_PATHS = frozenset({"/metrics", "/debug/state"})

HOST = re.compile(r"([A-Za-z0-9._~-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]*)?")
"""A host name or address with an optional port. Anything else would be a way into URLs built from it."""


class Guard:
    """An ASGI application that refuses what lacks its key and hands on the rest."""

    def __init__(self, app: ASGIApp, *, api_keys: Keys, admin_keys: Keys) -> None:
        self._app = app
        self._api_keys = api_keys
        self._admin_keys = admin_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the table above."""
        error = self._refusal(scope) if scope["type"] == "http" else None
        if error is None:
            await self._app(scope, receive, send)
        else:
            await _send_error(send, error)

    def _refusal(self, scope: Scope) -> TandemError | None:
        hosts = _values(scope, b"host")
        if len(hosts) > 1 or not all(HOST.fullmatch(host) for host in hosts):
            return InvalidRequest("the header host must be one host name")
        # The value that the router compares: nothing stands between this decision and that one.
        path = scope["path"]
        authorization = _values(scope, b"authorization")
        if path in OPEN_PATHS:
            return None
        if path in ADMIN_PATHS:
            if _is_from_here(scope, hosts) or self._admin_keys.admit(authorization):
                return None
            return Unauthenticated(f"{path} from elsewhere needs the admin key (--admin-key)")
        if not self._api_keys or self._api_keys.admit(authorization):
            return None
        return Unauthenticated("an API key is needed: send `Authorization: Bearer KEY`")


def _values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


def _is_from_here(scope: Scope, hosts: list[str]) -> bool:
    """From this machine and meant for it: a web page that rebinds its name to 127.0.0.1 is not."""
    client = scope.get("client")
    name = HOST.fullmatch(hosts[0]) if hosts else None
    meant = name is None or name[1] == "localhost" or _is_address(name[1])
    return client is not None and is_loopback(client[0]) and meant


def _is_address(name: str) -> bool:
    return name.startswith("[") or re.fullmatch(r"[0-9.]+", name) is not None


async def _send_error(send: Send, error: TandemError) -> None:
    kind = "authentication_error" if isinstance(error, Unauthenticated) else "invalid_request_error"
    body = {"message": error.message, "type": kind, "param": None, "code": error.reason.lower()}
    # A body that came with the request is not read.
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    if isinstance(error, Unauthenticated):
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": error.http_status, "headers": headers})
    await send({"type": "http.response.body", "body": orjson.dumps({"error": body})})
