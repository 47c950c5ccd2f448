"""The HTTP that every process has: /health, /ready, /metrics and /debug/state."""

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

from runtime.access import Keys
from runtime.errors import StartupError
from runtime.http_access import Guard
from runtime.http_head import BoundedHead
from runtime.metrics import exposition

TRUSTED_PROXIES = "127.0.0.1,::1"
"""Whose X-Forwarded-For is believed: behind a proxy on this machine a caller is not from this machine."""


def json_response(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON response written by orjson."""
    return Response(orjson.dumps(body), status, headers, media_type="application/json")


def admin_routes(
    registry: CollectorRegistry,
    state: Callable[[], dict[str, Any]],
    not_ready: Callable[[], str | None],
) -> list[Route]:
    """Routes over a process's own view: `state()` is /debug/state, `not_ready()` the reason for a 503.

    Who may see which of them is for `http_access.Guard`.
    """

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

    async def debug_state(_: Request) -> Response:
        return json_response(state())

    return [
        Route("/health", health),
        Route("/ready", ready),
        Route("/metrics", metrics),
        Route("/debug/state", debug_state),
    ]


def admin_app(routes: list[Route], admin_key: str | None) -> ASGIApp:
    """An application of nothing but these routes."""
    app = Starlette(routes=routes)
    app.router.redirect_slashes = False
    return Guard(app, api_keys=Keys(), admin_keys=Keys.parse(admin_key))


def bind(host: str, port: int, flag: str, *, share_port: bool = False) -> socket.socket:
    """A listening-ready TCP socket; StartupError names the flag when the address is taken.

    With `share_port` other processes may listen there, too, and each connection goes to any one of them.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named because asyncio sets TCP_NODELAY only where it is.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if share_port:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
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
            "http": BoundedHead,
            "ws": "none",
            "lifespan": "off",
            "log_config": None,
            "access_log": False,
            "server_header": False,
            "forwarded_allow_ips": TRUSTED_PROXIES,
        }
        super().__init__(uvicorn.Config(app, **(defaults | options)))

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to runtime.lifecycle."""
        yield
