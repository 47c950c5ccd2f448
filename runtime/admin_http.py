"""The HTTP that every process has: /health, /ready, /metrics and /debug/state."""

import hmac
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import orjson
import uvicorn
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from runtime.errors import StartupError
from runtime.metrics import exposition

LOOPBACK = ("127.", "::1")


def json_response(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON response written by orjson."""
    return Response(orjson.dumps(body), status, headers, media_type="application/json")


def admin_routes(
    registry: CollectorRegistry,
    state: Callable[[], dict[str, Any]],
    not_ready: Callable[[], str | None],
    admin_key: str | None,
) -> list[Route]:
    """Routes over a process's own view: `state()` is /debug/state, `not_ready()` the reason for a 503."""

    async def health(_: Request) -> Response:
        return json_response({"status": "alive"})

    async def ready(_: Request) -> Response:
        reason = not_ready()
        return json_response(
            {"status": "ready"} if reason is None else {"status": reason}, 200 if reason is None else 503
        )

    async def metrics(request: Request) -> Response:
        body, content_type = exposition(registry, request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})

    async def debug_state(request: Request) -> Response:
        if not _may_see_state(request, admin_key):
            return json_response({"error": {"message": "admin key required", "code": "UNAUTHENTICATED"}}, 401)
        return json_response(state())

    return [
        Route("/health", health),
        Route("/ready", ready),
        Route("/metrics", metrics),
        Route("/debug/state", debug_state),
    ]


def _may_see_state(request: Request, admin_key: str | None) -> bool:
    if request.client is not None and request.client.host.startswith(LOOPBACK):
        return True
    if not admin_key:
        return False
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    return hmac.compare_digest(given.encode(), admin_key.encode())


def admin_app(routes: list[Route]) -> Starlette:
    """An application of nothing but these routes."""
    return Starlette(routes=routes)


def bind(host: str, port: int, flag: str) -> socket.socket:
    """A listening-ready TCP socket; StartupError names the flag when the address is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named because asyncio sets TCP_NODELAY only where it is.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise StartupError(f"{flag} {port}: cannot listen on {host}:{port} ({error.strerror})") from error
    sock.listen(2048)
    sock.setblocking(False)
    return sock


class HttpServer(uvicorn.Server):
    """uvicorn inside a process that owns its own signals and loop."""

    def __init__(self, app: ASGIApp, **options: Any) -> None:
        defaults: dict[str, Any] = {
            "loop": "none",
            "http": "httptools",
            "ws": "none",
            "lifespan": "off",
            "log_config": None,
            "access_log": False,
            "server_header": False,
        }
        super().__init__(uvicorn.Config(app, **(defaults | options)))

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to runtime.lifecycle."""
        yield
