"""The gateway process: start, serve, drain.

1. Read the checkpoint's text files, bind all ports, start the three servers, print the `listening` line.
   No worker is needed for that; `/ready` says 503 until a decode worker is ready.
2. Serve until asked to stop.
3. Drain: not ready at once, running requests finish, then everything closes.
"""

import asyncio
import contextlib
import gc
import logging
import secrets
import socket
from collections.abc import AsyncIterator
from typing import Any

from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from gateway.exchange import with_request_id
from gateway.fleet import Fleet
from gateway.flow import Flow
from gateway.grammar_check import GrammarCheck
from gateway.http import HttpFace, build_app
from gateway.malformed import MalformedMessages
from gateway.metrics import GatewayMetrics
from gateway.model import ServedModel, load_model
from gateway.peers import Peers
from gateway.registry import Registry
from gateway.registry_service import RegistryServicer
from gateway.service import SERVICE, InferenceServicer
from gateway.telemetry import Telemetry, from_environment
from protos.tandem.v1 import inference_pb2_grpc, registry_pb2_grpc
from runtime import ledger, rpc
from runtime.access import Keys, call_metadata, is_loopback, require_internal_secret
from runtime.admin_http import HttpServer, admin_routes, bind
from runtime.checkpoint_dir import resolve
from runtime.clock import SystemClock
from runtime.http_access import ADMIN_PATHS, Guard
from runtime.lifecycle import Shutdown, settle, watch_lag
from runtime.limits import DRAIN_TIMEOUT_S
from runtime.memory_guard import MemoryGuard
from runtime.rpc_access import INTERNAL_REFUSAL, PUBLIC_REFUSAL, KeyGuard
from runtime.settings import GatewaySettings

logger = logging.getLogger(__name__)

INTERNAL_MESSAGE_BYTES = 1024 * 1024

HEALTH_TICK_S = 0.1
"""How often gRPC health follows /ready."""

GC_THRESHOLDS = (20_000, 50, 50)
"""A token leaves no cycles behind. With Python's own thresholds a seventh of the time under 2,048 streams was
spent on looking for them."""

CLOSE_GRACE_S = 2.0
"""Connections have this long to close after the drain."""


class Gateway:
    """Everything that one gateway process serves."""

    def __init__(
        self, settings: GatewaySettings, model: ServedModel, telemetry: Telemetry | None = None
    ) -> None:
        self._settings = settings
        self._model = model
        self.metrics = GatewayMetrics()
        gateway_id = f"gateway-{secrets.token_hex(4)}"
        self.telemetry = telemetry or from_environment(gateway_id)
        self.fleet = Fleet(
            Registry(SystemClock(), model.tokenizer_hash),
            gateway_id,
            self.metrics,
            call_metadata(settings.internal_secret),
        )
        self._grammars = GrammarCheck(model.root / "tokenizer.json", model.limits.vocab_size)
        self.flow = Flow(
            model,
            self.fleet,
            self.metrics,
            self._grammars,
            self.telemetry,
            max_concurrent_requests=settings.max_concurrent_requests,
            max_waiting_requests=settings.max_waiting_requests,
            request_timeout_s=settings.request_timeout_s,
            local_prefill_threshold=settings.local_prefill_threshold,
            migration_timeout_s=settings.migration_timeout_s,
            share_prefix_cache=settings.share_prefix_cache,
            check_memory=MemoryGuard(settings.max_memory_share).check,
        )
        self._health = health.aio.HealthServicer()
        self._api_keys = Keys.parse(settings.api_keys)
        self._public = rpc.server(
            [KeyGuard(self._api_keys, PUBLIC_REFUSAL), MalformedMessages(SERVICE)],
            max_message_bytes=2 * settings.max_body_bytes,
            share_port=bool(settings.peer_directory),
        )
        self._internal = rpc.server(
            [KeyGuard(Keys.parse(settings.internal_secret), INTERNAL_REFUSAL)],
            max_message_bytes=INTERNAL_MESSAGE_BYTES,
        )
        self._peers = Peers(
            settings.peer_directory, gateway_id, self.metrics.registry, self.state, self.flow.abort
        )
        self._http = HttpServer(self._app(), timeout_graceful_shutdown=CLOSE_GRACE_S)
        self._socket: socket.socket | None = None
        self.grpc_port = 0
        self.internal_port = 0

    @property
    def http_port(self) -> int:
        """The port that HTTP listens on."""
        assert self._socket is not None
        port: int = self._socket.getsockname()[1]
        return port

    def bind(self) -> None:
        """Take all ports; StartupError names the flag of one that is taken."""
        settings = self._settings
        self._socket = bind(
            settings.host, settings.http_port, "--http-port", share_port=bool(settings.peer_directory)
        )
        servicer = InferenceServicer(self.flow, self._api_keys, self._peers.abort)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, self._public)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._public)
        if settings.reflection:
            names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._public)
        registry_pb2_grpc.add_RegistryServiceServicer_to_server(RegistryServicer(self.fleet), self._internal)
        self.grpc_port = rpc.listen(self._public, settings.host, settings.grpc_port, "--grpc-port")
        host = settings.internal_host or settings.host
        self.internal_port = rpc.listen(self._internal, host, settings.internal_port, "--internal-port")

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """All servers and tasks, for as long as the context is open."""
        assert self._socket is not None
        await self._set_health(serving=False)
        async with asyncio.TaskGroup() as tasks:
            fleet = tasks.create_task(self.fleet.run())
            health_watch = tasks.create_task(self._watch_health())
            lag_watch = tasks.create_task(watch_lag(self.metrics.loop_lag.observe))
            http = tasks.create_task(self._http.serve(sockets=[self._socket]))
            peers = tasks.create_task(self._peers.serve())
            await self._internal.start()
            await self._public.start()
            try:
                yield
            finally:
                self._http.should_exit = True
                self._peers.close()
                await asyncio.gather(self._public.stop(CLOSE_GRACE_S), http, peers)
                health_watch.cancel()
                lag_watch.cancel()
                fleet.cancel()
                await self._internal.stop(0)
                await self._grammars.close()
                if self._model.chat is not None:
                    await self._model.chat.close()

    async def drain(self, timeout: float) -> None:
        """Not ready from now on; running requests have `timeout` seconds."""
        self.flow.draining = True
        await self._health.enter_graceful_shutdown()
        await self.flow.drain(timeout)

    def listening_line(self) -> str:
        """What the launcher reads."""
        host = _in_url(self._settings.host)
        internal = _in_url(self._settings.internal_host or self._settings.host)
        return (
            f"listening http=http://{host}:{self.http_port} grpc={host}:{self.grpc_port} "
            f"internal={internal}:{self.internal_port}"
        )

    def not_ready(self) -> str | None:
        """Why no request can be served; None if one can."""
        return "the server is shutting down" if self.flow.draining else self.fleet.not_ready()

    def state(self) -> dict[str, Any]:
        """Live counts for /debug/state; blocks, transfers and links live on the workers."""
        return {
            "id": self.fleet.gateway_id,
            "requests": self.flow.num_live,
            "requests_running": self.flow.num_running,
            "requests_waiting": self.flow.num_waiting,
            "blocks_used": 0,
            "blocks_cached": 0,
            "blocks_total": 0,
            "transfers": 0,
            "links": 0,
            "workers": self.fleet.describe(),
            "ledger": ledger.describe(requests=self.flow.ledger, attempts=self.fleet.attempts),
            **ledger.process_counts(),
        }

    def _app(self) -> Any:
        own = admin_routes(self.metrics.registry, self.state, self.not_ready)
        routes = [*self._peers.routes(), *(route for route in own if route.path not in ADMIN_PATHS)]
        face = HttpFace(self.flow, self._api_keys, max_body_bytes=self._settings.max_body_bytes)
        app = Guard(
            build_app(face, routes),
            api_keys=self._api_keys,
            admin_keys=Keys.parse(self._settings.admin_key),
        )
        return with_request_id(app)

    async def _watch_health(self) -> None:
        while True:
            if not self.flow.draining:
                await self._set_health(serving=self.not_ready() is None)
            await asyncio.sleep(HEALTH_TICK_S)

    async def _set_health(self, *, serving: bool) -> None:
        status = (
            health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for name in ("", SERVICE):
            await self._health.set(name, status)


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


async def serve(settings: GatewaySettings, shutdown: Shutdown) -> None:
    """Run the gateway until a shutdown is requested and everything is closed."""
    require_internal_secret(settings.internal_host or settings.host, settings.internal_secret)
    path = await asyncio.to_thread(resolve, settings.model, weights=False)
    model = await asyncio.to_thread(
        load_model, path, name=settings.served_model_name, chat_template=settings.chat_template
    )
    if model.chat is not None:
        await model.chat.start()
    gateway = Gateway(settings, model)
    gateway.bind()
    settle()
    gc.set_threshold(*GC_THRESHOLDS)
    async with gateway.serving():
        print(gateway.listening_line(), flush=True)  # noqa: T201 - the launcher reads it
        logger.info("serving %s from %s", model.name, model.root)
        if not settings.api_keys and not is_loopback(settings.host):
            logger.warning(
                "--host %s without --api-keys: everybody who can reach it is served", settings.host
            )
        await shutdown.requested.wait()
        await gateway.drain(DRAIN_TIMEOUT_S)
    await gateway.telemetry.close()
