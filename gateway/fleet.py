"""The workers of this gateway: the registry, and one attach client for each worker that lives."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

from gateway.attach import AttachClient
from gateway.attempt import Source
from gateway.metrics import GatewayMetrics
from gateway.prefix_index import MAX_BLOCKS, Chain, PrefixIndex, prefix_chain
from gateway.registry import Registration, Registry, State
from gateway.router import Candidate
from protos.tandem.v1 import common_pb2, registry_pb2
from runtime.clock import SystemClock
from runtime.ledger import Account

logger = logging.getLogger(__name__)

TICK_S = 0.05
"""How often silence is looked for."""

LATE_S = 0.2
"""A tick that comes later than this means that nobody listened: what was said waits in the sockets."""

SOURCES = {
    common_pb2.WORKER_ROLE_PREFILL: Source.PREFILL,
    common_pb2.WORKER_ROLE_DECODE: Source.DECODE,
}


class Fleet:
    """Acts on what the registry decides. `run` owns every task."""

    def __init__(
        self,
        registry: Registry,
        gateway_id: str,
        metrics: GatewayMetrics,
        credentials: tuple[tuple[str, str], ...] = (),
    ) -> None:
        """`credentials` is the metadata that workers ask of calls."""
        self._credentials = credentials
        self.registry = registry
        self._clock = SystemClock()
        self.attempts = Account()
        """On workers, as far as this gateway knows."""
        self.gateway_id = gateway_id
        self._prefixes = PrefixIndex()
        self._metrics = metrics
        self._clients: dict[str, AttachClient] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._group: asyncio.TaskGroup | None = None

    async def run(self) -> None:
        """Watch the workers until cancelled."""
        async with asyncio.TaskGroup() as self._group:
            while True:
                due_s = self._clock.now() + TICK_S
                await asyncio.sleep(TICK_S)
                late_s = self._clock.now() - due_s
                if late_s > LATE_S:
                    self._excuse(late_s)
                self._expire()

    def _excuse(self, seconds: float) -> None:
        logger.warning("the event loop stood still for %.1f s", seconds)
        self.registry.excuse(seconds)
        for client in self._clients.values():
            client.excuse(seconds)

    def _expire(self) -> None:
        for registration in self.registry.expire():
            logger.warning("worker %s: no heartbeat, taken for hung", registration.worker_id)
            self._detach(registration.worker_id)
        for client in self._clients.values():
            client.expire()

    def join(self, info: registry_pb2.WorkerInfo) -> Registration:
        """Admit a worker and attach to it; Mismatch or InvalidRequest if it does not fit."""
        assert self._group is not None
        registration = self.registry.register(info)
        self._detach(registration.worker_id)
        client = AttachClient(
            info.identity,
            SOURCES[info.role],
            self.gateway_id,
            self._metrics.dropped_frames.inc,
            self._credentials,
            self.attempts,
        )
        self._clients[registration.worker_id] = client
        self._tasks[registration.worker_id] = self._group.create_task(client.run())
        logger.info("worker %s (%s) registered", registration.worker_id, client.source.value)
        return registration

    def leave(self, registration: Registration) -> None:
        """The worker's registration ended; its attempts fail at once."""
        if self.registry.leave(registration):
            logger.info("worker %s left", registration.worker_id)
            self._detach(registration.worker_id)

    def heartbeat(self, registration: Registration, state: common_pb2.WorkerState) -> bool:
        """The worker lives; False if it must register again."""
        alive = self.registry.heartbeat(registration, state)
        if alive and registration.state is State.DOWN:
            self._detach(registration.worker_id)
        return alive

    def client(self, worker_id: str) -> AttachClient:
        """The attach client of a candidate."""
        return self._clients[worker_id]

    def is_registered(self, identity: common_pb2.WorkerIdentity) -> bool:
        """Whether this very process of a worker is still among us."""
        client = self._clients.get(identity.worker_id)
        return client is not None and client.identity.boot_id == identity.boot_id

    def abort(self, worker_id: str, request: int, attempt: int) -> None:
        """Tell a worker to give an attempt up; no-op if the worker or the attempt is gone."""
        client = self._clients.get(worker_id)
        if client is not None:
            client.abort(request, attempt)

    def abort_choice(self, worker_id: str, request: int, attempt: int, choice: int) -> None:
        """Tell a worker to end one choice of an attempt; no-op if the worker or the attempt is gone."""
        client = self._clients.get(worker_id)
        if client is not None:
            client.abort_choice(request, attempt, choice)

    def prefix(self, token_ids: Sequence[int], salt: str) -> Chain:
        """Names a sequence's prefixes to `candidates` and `remember`; empty as long as no worker is there."""
        facts = self.registry.facts
        return prefix_chain(token_ids, salt, facts.block_size) if facts and facts.block_size else ()

    def cached_tokens(self, worker_id: str, prefix: Chain) -> int:
        """How much of a sequence the worker probably has in its prefix cache."""
        client, facts = self._clients.get(worker_id), self.registry.facts
        if client is None or facts is None:
            return 0
        return self._prefixes.overlap(client.identity.boot_id, prefix) * facts.block_size

    def remember(self, worker_id: str, prefix: Chain) -> None:
        """The worker has, or will have, the KV of these blocks; no-op if it is gone."""
        client = self._clients.get(worker_id)
        if client is not None:
            num_blocks = client.load.blocks_total or MAX_BLOCKS
            self._prefixes.add(client.identity.boot_id, prefix, num_blocks)

    def candidates(self, prefix: Chain = ()) -> list[Candidate]:
        """Workers that can take a request now, with what they know of its prefix."""
        return [
            self._candidate(client, prefix)
            for worker in self.registry.alive()
            if worker.state is State.READY and (client := self._clients[worker.worker_id]).connected
        ]

    def not_ready(self) -> str | None:
        """Why no request can be served; None if one can."""
        if any(candidate.role is Source.DECODE for candidate in self.candidates()):
            return None
        decodes = [w for w in self.registry.alive() if SOURCES[w.info.role] is Source.DECODE]
        states = ", ".join(f"{worker.worker_id} is {worker.state.value}" for worker in decodes)
        return f"no decode worker is ready ({states or 'none registered'})"

    def describe(self) -> list[dict[str, Any]]:
        """workers[] of /debug/state."""
        return [self._describe(worker) for worker in self.registry.all()]

    def load(self, worker_id: str) -> common_pb2.WorkerLoad:
        """The last load that a worker reported; zeros once it is down."""
        client = self._clients.get(worker_id)
        return client.load if client else common_pb2.WorkerLoad()

    def _describe(self, worker: Registration) -> dict[str, Any]:
        load = self.load(worker.worker_id)
        client = self._clients.get(worker.worker_id)
        return {
            "id": worker.worker_id,
            "role": SOURCES[worker.info.role].value,
            "state": worker.state.value,
            "attached": client is not None and client.connected,
            "address": worker.info.identity.address,
            "http": worker.info.http,
            "pid": worker.info.pid,
            "boot_id": worker.info.identity.boot_id,
            "restarts": worker.restarts,
            "blocks_used": load.blocks_used,
            "blocks_total": load.blocks_total,
            "requests_running": load.requests_running,
            "requests_waiting": load.requests_waiting,
            "transfers": load.transfers,
        }

    def _detach(self, worker_id: str) -> None:
        """Stop the client of a worker; its attempts learn of the loss at once."""
        client = self._clients.pop(worker_id, None)
        task = self._tasks.pop(worker_id, None)
        if client is not None and task is not None:
            client.lose()
            task.cancel()
            self._prefixes.forget(client.identity.boot_id)

    def _candidate(self, client: AttachClient, prefix: Chain) -> Candidate:
        load = client.load
        return Candidate(
            worker_id=client.identity.worker_id,
            role=client.source,
            queued_prefill_tokens=max(load.queued_prefill_tokens, client.num_uncomputed_tokens),
            num_requests=max(load.requests_running + load.requests_waiting, client.num_live),
            blocks_free=load.blocks_total - load.blocks_used,
            cached_tokens=self.cached_tokens(client.identity.worker_id, prefix),
        )
