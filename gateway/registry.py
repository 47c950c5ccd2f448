"""Who is alive and in which state. Pure: the caller brings the clock and acts on what it is told.

1. `register` admits a worker whose model fits, or raises Mismatch naming the fields that differ. A newer
   registration of the same id replaces the older one.
2. `heartbeat` keeps it alive and carries its state.
3. `leave` (the stream ended) or `expire` (silence) makes it `down`; it stays listed for a minute.
"""

import enum
from dataclasses import dataclass

from protos.tandem.v1 import common_pb2, registry_pb2
from runtime.clock import Clock
from runtime.errors import InvalidRequest, Mismatch
from runtime.limits import HANG_S
from runtime.version import PROTOCOL_MAJOR

KEEP_DOWN_S = 60.0
"""A worker that ended stays listed for this long."""


class State(enum.Enum):
    """A worker's state, as heartbeats and silence tell it."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    DOWN = "down"


STATES: dict[common_pb2.WorkerState, State] = {
    common_pb2.WORKER_STATE_STARTING: State.STARTING,
    common_pb2.WORKER_STATE_READY: State.READY,
    common_pb2.WORKER_STATE_DRAINING: State.DRAINING,
    common_pb2.WORKER_STATE_DOWN: State.DOWN,
}


@dataclass(eq=False)
class Registration:
    """One life of a worker, as this gateway knows it. Owned by the registry; others read."""

    info: registry_pb2.WorkerInfo
    state: State
    heard_s: float
    down_s: float | None = None
    restarts: int = 0
    """Lives of this worker before this one, as long as it has not been forgotten between two of them."""

    @property
    def worker_id(self) -> str:
        """The worker's stable name."""
        return self.info.identity.worker_id


class Registry:
    """All workers of this gateway by id."""

    def __init__(self, clock: Clock, tokenizer_hash: str) -> None:
        self._clock = clock
        self._tokenizer_hash = tokenizer_hash
        self._workers: dict[str, Registration] = {}

    def register(self, info: registry_pb2.WorkerInfo) -> Registration:
        """Admit a worker in state `starting`; its first heartbeat tells more."""
        _check_complete(info)
        self._check_fits(info)
        registration = Registration(info, State.STARTING, self._clock.now())
        if before := self._workers.get(registration.worker_id):
            is_same = before.info.identity.boot_id == info.identity.boot_id
            registration.restarts = before.restarts + (not is_same)
        self._workers[info.identity.worker_id] = registration
        return registration

    def heartbeat(self, registration: Registration, state: common_pb2.WorkerState) -> bool:
        """The worker lives; False if this registration has lapsed and the worker must register again."""
        if not self._is_current(registration):
            return False
        registration.heard_s = self._clock.now()
        registration.state = STATES.get(state, State.STARTING)
        if registration.state is State.DOWN:
            self._down(registration)
        return True

    def leave(self, registration: Registration) -> bool:
        """The worker's stream ended; True if that took it out of the registry."""
        if not self._is_current(registration):
            return False
        self._down(registration)
        return True

    def excuse(self, seconds: float) -> None:
        """We did not listen for so long: no silence of that time counts."""
        for worker in self.alive():
            worker.heard_s += seconds

    def expire(self) -> list[Registration]:
        """Workers that have just been found silent; forgets those down for a minute."""
        now = self._clock.now()
        silent = [worker for worker in self.alive() if now - worker.heard_s > HANG_S]
        for worker in silent:
            self._down(worker)
        for worker in list(self._workers.values()):
            if worker.down_s is not None and now - worker.down_s > KEEP_DOWN_S:
                del self._workers[worker.worker_id]
        return silent

    def all(self) -> list[Registration]:
        """Every worker, those that ended included, by id."""
        return [self._workers[worker_id] for worker_id in sorted(self._workers)]

    def alive(self) -> list[Registration]:
        """Workers that are not down."""
        return [worker for worker in self.all() if worker.state is not State.DOWN]

    def get(self, worker_id: str) -> Registration | None:
        """The latest registration of a worker."""
        return self._workers.get(worker_id)

    @property
    def facts(self) -> registry_pb2.ModelFacts | None:
        """The model of the workers that live; None without any."""
        return next((worker.info.model for worker in self.alive()), None)

    def _is_current(self, registration: Registration) -> bool:
        return (
            self._workers.get(registration.worker_id) is registration and registration.state is not State.DOWN
        )

    def _down(self, registration: Registration) -> None:
        registration.state = State.DOWN
        registration.down_s = self._clock.now()

    def _check_fits(self, info: registry_pb2.WorkerInfo) -> None:
        if info.protocol_major != PROTOCOL_MAJOR:
            raise Mismatch(f"protocol_major: gateway {PROTOCOL_MAJOR}, worker {info.protocol_major}")
        differing = []
        if info.model.tokenizer_hash != self._tokenizer_hash:
            differing.append("tokenizer_hash")
        others = [w.info.model for w in self.alive() if w.worker_id != info.identity.worker_id]
        if others:
            differing += [
                field.name
                for field in info.model.DESCRIPTOR.fields
                if field.name not in differing
                and getattr(info.model, field.name) != getattr(others[0], field.name)
            ]
        if differing:
            raise Mismatch(
                f"{', '.join(differing)}: differs between this worker and the gateway's other workers"
            )

    def check(self) -> None:
        """Ids name their registrations, and down workers know since when."""
        for worker_id, worker in self._workers.items():
            assert worker.worker_id == worker_id
            assert (worker.state is State.DOWN) == (worker.down_s is not None)


def _check_complete(info: registry_pb2.WorkerInfo) -> None:
    for name in ("worker_id", "boot_id", "address"):
        if not getattr(info.identity, name):
            raise InvalidRequest(f"identity.{name} is missing", field=f"identity.{name}")
    if info.role not in (common_pb2.WORKER_ROLE_PREFILL, common_pb2.WORKER_ROLE_DECODE):
        raise InvalidRequest("role must be prefill or decode", field="role")
    if info.model.max_model_len < 1 or info.model.vocab_size < 1:
        raise InvalidRequest("model.max_model_len and model.vocab_size must be positive", field="model")
