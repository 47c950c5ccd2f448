"""Assembles a worker process of either role.

1. Load the model, size the pool, start the engine thread.
2. Listen: gRPC for gateways and links, HTTP for metrics; then register with the gateways.
3. Serve until a shutdown is asked for or the engine dies.
4. Drain: refuse new attempts, finish the running ones, fail the rest as retryable, stop.
"""

import asyncio
import logging
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import grpc.aio
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from engine.config import EngineConfig, usual_batched_tokens, usual_layer_stream_threshold
from engine.engine import Engine
from engine.loader import load_model
from engine.parallel.start import start_ranks, starting
from kvtransfer.layout import KvFacts, KvGroup
from protos.tandem.v1 import common_pb2, registry_pb2
from runtime import admin_http, ledger, rpc
from runtime.access import Keys, call_metadata
from runtime.checkpoint_dir import bundled_model, file_hash, resolve
from runtime.clock import SystemClock
from runtime.config import parse_bytes
from runtime.errors import Unavailable
from runtime.lifecycle import Shutdown, settle, watch_lag
from runtime.limits import DRAIN_TIMEOUT_S
from runtime.memory_guard import MemoryGuard
from runtime.otlp import FLUSH_TIMEOUT_S, open_tracer
from runtime.rpc_access import INTERNAL_REFUSAL, KeyGuard
from runtime.settings import WorkerSettings
from runtime.version import PROTOCOL_MAJOR, VERSION
from worker import address
from worker.attach import AttachHub, AttemptHandler
from worker.bridge import EngineBridge
from worker.devices import device_names
from worker.devices import use as use_device
from worker.engine_thread import EngineThread, StepHandler
from worker.grammar_intake import GrammarIntake
from worker.membership import Membership
from worker.metrics import WorkerMetrics
from worker.speculation_metrics import SpeculationCollector
from worker.speculative import parse_speculative
from worker.timeline import Timelines
from worker.transports import link_memory_bytes

logger = logging.getLogger(__name__)

PROGRESS_INTERVAL_S = 2.0
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
ROLE_NAMES = {common_pb2.WORKER_ROLE_PREFILL: "prefill", common_pb2.WORKER_ROLE_DECODE: "decode"}


@dataclass(frozen=True, kw_only=True)
class WorkerParts:
    """What a role is built from."""

    settings: WorkerSettings
    identity: common_pb2.WorkerIdentity
    facts: KvFacts
    engine: Engine
    """Outside its thread only `grammars` and what never changes (the pool's tensors, facts) are used."""
    bridge: EngineBridge
    metrics: WorkerMetrics


class Role(AttemptHandler, StepHandler, Protocol):
    """What differs between a prefill and a decode worker."""

    def add_services(self, server: grpc.aio.Server) -> list[str]:
        """Add the role's gRPC services; returns their full names."""
        ...

    def links(self) -> dict[str, str]:
        """Transports of the KV links that are open, by the worker at the other end."""
        ...

    def num_transfers(self) -> int:
        """KV transfers that have not ended."""
        ...

    async def run(self) -> None:
        """The role's own background work, until cancelled."""
        ...


RoleFactory = Callable[[WorkerParts], Role]


async def serve(
    kind: common_pb2.WorkerRole, factory: RoleFactory, settings: WorkerSettings, shutdown: Shutdown
) -> None:
    """Run one worker until `shutdown` is requested."""
    settings = await asyncio.to_thread(address.placed, settings)
    engine, tokenizer_hash = await asyncio.to_thread(_load_engine, kind, settings)
    worker = Worker(kind, factory, settings, engine, tokenizer_hash, shutdown)
    settle()
    await worker.serve()


def _load_engine(kind: common_pb2.WorkerRole, settings: WorkerSettings) -> tuple[Engine, str]:
    torch.set_num_threads(settings.threads)
    path = resolve(settings.model, weights=True) if settings.model else bundled_model()
    speculative, draft_model = parse_speculative(settings.speculative, path)
    names = device_names(settings.devices, settings.tensor_parallel_size)
    use_device(names[0])
    decodes = kind != common_pb2.WORKER_ROLE_PREFILL
    config = EngineConfig(
        device=names[0],
        dtype=settings.dtype,
        max_model_len=settings.max_model_len,
        block_size=settings.block_size,
        kv_cache_memory_bytes=_kv_cache_memory(settings),
        gpu_memory_utilization=settings.gpu_memory_utilization,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=_batched_tokens(settings, names[0]),
        prefix_cache=settings.prefix_cache,
        scheduling_policy=settings.scheduling_policy,
        preemption_mode=settings.preemption_mode,
        swap_space_bytes=parse_bytes(settings.swap_space, "--swap-space"),
        speculative=speculative,
        draft_model=draft_model,
        num_draft_tokens=None if settings.num_draft_tokens == "auto" else settings.num_draft_tokens,
        draft_acceptance=settings.draft_acceptance,
        cuda_graphs=settings.cuda_graphs if decodes else "off",
        cuda_graph_sizes=tuple(settings.cuda_graph_sizes),
        overlap=settings.overlap if decodes else "off",
        layer_stream_threshold=0 if decodes else _layer_stream_threshold(settings, names[0]),
        linked_memory_bytes=link_memory_bytes(settings, names[0]),
    )
    ranks = start_ranks(path, config, names, module="worker.lanes.follower")
    with starting(ranks):
        engine = Engine(config, load_model(path, config, ranks=ranks, progress=_Progress(path)))
    return engine, file_hash(path / "tokenizer.json")


def _kv_cache_memory(settings: WorkerSettings) -> int | None:
    size = settings.kv_cache_memory
    return None if size == "auto" else parse_bytes(size, "--kv-cache-memory")


def _batched_tokens(settings: WorkerSettings, device: str) -> int:
    asked = settings.max_num_batched_tokens
    return usual_batched_tokens(device) if asked == "auto" else asked


def _layer_stream_threshold(settings: WorkerSettings, device: str) -> int:
    asked = settings.layer_stream_threshold
    return usual_layer_stream_threshold(device) if asked == "auto" else asked


class _Progress:
    """Loading, as a log line every few seconds: a small model loads in silence."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._clock = SystemClock()
        self._said_at = self._clock.now()

    def __call__(self, done: int, total: int) -> None:
        if self._clock.now() - self._said_at >= PROGRESS_INTERVAL_S:
            self._said_at = self._clock.now()
            logger.info("loading %s: %d of %d MiB", self._path.name, done >> 20, total >> 20)


class Worker:
    """One worker process: its servers, its engine thread and its role."""

    def __init__(
        self,
        kind: common_pb2.WorkerRole,
        factory: RoleFactory,
        settings: WorkerSettings,
        engine: Engine,
        tokenizer_hash: str,
        shutdown: Shutdown,
    ) -> None:
        self._kind = kind
        self._settings = settings
        self._shutdown = shutdown
        self._engine = engine
        self._facts = kv_facts(engine, tokenizer_hash)
        self._metrics = WorkerMetrics("sender" if kind == common_pb2.WORKER_ROLE_PREFILL else "receiver")
        self._bridge = EngineBridge(asyncio.get_running_loop())
        guard = KeyGuard(Keys.parse(settings.internal_secret), INTERNAL_REFUSAL)
        self._server = rpc.server([guard], max_message_bytes=MAX_MESSAGE_BYTES)
        port = rpc.listen(self._server, settings.host, settings.port, "--port")
        self._identity = common_pb2.WorkerIdentity(
            worker_id=settings.worker_id or f"{ROLE_NAMES[kind]}-{secrets.token_hex(4)}",
            boot_id=secrets.token_hex(16),
            address=f"{settings.advertise_host or settings.host}:{port}",
        )
        self._tracer = open_tracer(f"tandem-{ROLE_NAMES[kind]}", self._identity.worker_id)
        parts = WorkerParts(
            settings=settings, identity=self._identity, facts=self._facts, engine=engine,
            bridge=self._bridge, metrics=self._metrics,
        )  # fmt: skip
        self._role = factory(parts)
        self._bridge.timelines = Timelines(self._tracer, ROLE_NAMES[kind], self._metrics.stage_ended)
        intake = GrammarIntake(self._role, engine.grammars, self._bridge.fail)
        memory = MemoryGuard(settings.max_memory_share)
        self._metrics.memory_used.set_function(memory.share)
        self._bridge.hub = AttachHub(intake, self._load, self._bridge.timelines, check_memory=memory.check)
        self._bridge.thread = EngineThread(
            engine, self._role, self._on_engine_death, enter=partial(use_device, engine.config.device)
        )
        self._metrics.watch(self._bridge.load)
        self._metrics.watch_attempts(
            ROLE_NAMES[kind], self._bridge.timelines, lambda: self._bridge.thread.busy_s
        )
        self._metrics.watch_prefix_cache(engine.prefix_cache_stats)
        self._metrics.registry.register(SpeculationCollector(engine.speculation_stats))
        self._health = health.aio.HealthServicer()

    def _on_engine_death(self, reason: str) -> None:
        self._bridge.on_loop(self._shutdown.request, reason, 1)

    async def serve(self) -> None:
        """From listening to the end of the drain."""
        services = self._role.add_services(self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        socket = admin_http.bind(self._settings.host, self._settings.metrics_port, "--metrics-port")
        http_port = socket.getsockname()[1]
        app = admin_http.admin_app(self._admin_routes(), self._settings.admin_key)
        http = admin_http.HttpServer(app)
        credentials = call_metadata(self._settings.internal_secret)
        is_hung = self._bridge.thread.watch.is_hung
        membership = Membership(self._info(http_port), self._settings.gateway, credentials, is_hung)
        self._bridge.snapshot(self._engine)
        self._engine.model.ranks.watch(self._on_engine_death)
        self._bridge.thread.start()
        await self._server.start()
        await self._set_health(services, health_pb2.HealthCheckResponse.SERVING)
        logger.info("%s serves on %s", self._identity.worker_id, self._identity.address)
        async with asyncio.TaskGroup() as tasks:
            background = [
                tasks.create_task(membership.run()),
                tasks.create_task(self._role.run()),
                tasks.create_task(watch_lag(self._metrics.loop_lag.observe)),
                tasks.create_task(http.serve(sockets=[socket])),
            ]
            await self._shutdown.requested.wait()
            membership.drain()
            await self._set_health(services, health_pb2.HealthCheckResponse.NOT_SERVING)
            await self._drain()
            http.should_exit = True
            for task in background[:3]:
                task.cancel()
        await self._stop()

    async def _set_health(self, services: list[str], status: Any) -> None:
        for name in ["", *services]:
            await self._health.set(name, status)

    async def _drain(self) -> None:
        """Let running attempts finish; what is left after the deadline may be tried elsewhere."""
        hub = self._bridge.hub
        hub.draining = True
        if not self._shutdown.exit_code:
            try:
                async with asyncio.timeout(DRAIN_TIMEOUT_S):
                    while hub.num_live or self._role.num_transfers():
                        await asyncio.sleep(0.02)
            except TimeoutError:
                logger.warning("drain: %d attempts did not finish in time", hub.num_live)
        hub.fail_all(Unavailable("the worker is shutting down", retryable=True))
        await asyncio.sleep(0.05 if hub.num_live == 0 else 0.2)

    async def _stop(self) -> None:
        await self._server.stop(grace=0.5)
        await asyncio.to_thread(self._bridge.thread.stop, 5.0)
        await asyncio.to_thread(self._engine.model.ranks.close)
        await asyncio.to_thread(self._tracer.close, FLUSH_TIMEOUT_S)

    def _info(self, http_port: int) -> registry_pb2.WorkerInfo:
        facts = self._engine.facts
        host = self._settings.advertise_host or self._settings.host
        return registry_pb2.WorkerInfo(
            identity=self._identity,
            role=self._kind,
            http=f"http://{host}:{http_port}",
            pid=os.getpid(),
            version=VERSION,
            protocol_major=PROTOCOL_MAJOR,
            model=registry_pb2.ModelFacts(
                model_hash=facts.model_hash,
                tokenizer_hash=self._facts.tokenizer_hash,
                max_model_len=facts.max_model_len,
                vocab_size=facts.vocab_size,
                eos_token_ids=facts.eos_token_ids,
                block_size=self._facts.block_size,
                dtype=facts.dtype,
            ),
        )

    def _admin_routes(self) -> list[Any]:
        return admin_http.admin_routes(self._metrics.registry, self._state, self._not_ready)

    def _not_ready(self) -> str | None:
        if self._bridge.thread.watch.is_hung():
            return "a step of the engine hangs"
        return "draining" if self._shutdown.requested.is_set() else None

    def _load(self) -> common_pb2.WorkerLoad:
        load = common_pb2.WorkerLoad(transfers=self._role.num_transfers())
        load.MergeFrom(self._bridge.load())
        return load

    def _state(self) -> dict[str, Any]:
        load, links = self._load(), self._role.links()
        return {
            "id": self._identity.worker_id,
            "boot_id": self._identity.boot_id,
            "role": ROLE_NAMES[self._kind],
            "state": "draining" if self._shutdown.requested.is_set() else "ready",
            "blocks_used": load.blocks_used,
            "blocks_cached": load.blocks_cached,
            "blocks_total": load.blocks_total,
            "requests_running": load.requests_running,
            "requests_waiting": load.requests_waiting,
            "attempts": self._bridge.hub.num_live,
            "gateways": self._bridge.hub.gateways,
            "transfers": load.transfers,
            "links": len(links),
            "transports": links,
            "steps": self._bridge.thread.num_steps,
            "ledger": ledger.describe(blocks=self._bridge.blocks, attempts=self._bridge.hub.attempts),
            **ledger.process_counts(),
        }


def kv_facts(engine: Engine, tokenizer_hash: str) -> KvFacts:
    """What both ends of a link must agree on, from the engine's own facts."""
    facts = engine.facts
    groups = tuple(
        KvGroup(
            name=group.name,
            num_layers=group.num_layers,
            num_kv_heads=group.num_kv_heads,
            head_dim=group.head_dim,
            dtype=group.dtype,
        )
        for group in facts.kv_groups
    )
    return KvFacts(
        protocol_major=PROTOCOL_MAJOR,
        model_hash=facts.model_hash,
        tokenizer_hash=tokenizer_hash,
        block_size=engine.config.block_size,
        max_model_len=facts.max_model_len,
        rope=facts.rope,
        groups=groups,
    )
