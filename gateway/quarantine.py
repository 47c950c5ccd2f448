"""Requests that kill workers: who is suspected, who is convicted, and what is not tried again. Pure.

1. A worker dies. Each request on it that has not proven harmless gets a strike: it is a suspect.
2. A suspect is tried again on trial: one suspect at a time (`trials`), so that the next death has one author.
3. PROVEN_AFTER_STEPS steps of a decode worker prove a request harmless, and clear a suspect. Who had proven
   harmless when a worker died is no suspect, once: a poison may lie further on in its output.
4. A suspect under which a second worker dies, with no other suspect on it, is convicted. Its client gets an
   error, and identical requests are refused for QUARANTINE_S.

So one request costs two workers, three if it runs well for a while; a request that was beside it is tried
again and goes on.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from protos.tandem.v1 import common_pb2 as pb
from runtime.clock import Clock
from runtime.errors import Quarantined, Unavailable

PROVEN_AFTER_STEPS = 8
"""More than can be under way to us when a worker dies, and not long to wait for."""

MAX_STRIKES = 2

QUARANTINE_S = 600.0

MAX_QUARANTINED = 1024
"""The oldest verdict makes room."""


class WorkerLost(Unavailable):
    """A worker is gone with its attempts. `alone`: no other suspect was on it."""

    def __init__(self, identity: pb.WorkerIdentity, *, alone: bool) -> None:
        super().__init__(f"worker {identity.worker_id} is gone", retryable=True, retry_after_s=1.0)
        self.identity = identity
        self.alone = alone


class Suspicion:
    """What the deaths of its workers say about one request, across its attempts."""

    def __init__(self) -> None:
        self.strikes = 0
        self._proven = False
        self._num_steps = 0
        """Of decode workers in this attempt."""

    @property
    def is_suspect(self) -> bool:
        """Whether it is to be tried apart from other suspects."""
        return self.strikes > 0

    def begin(self) -> None:
        """Another attempt begins."""
        self._num_steps = 0

    def on_step(self) -> None:
        """A decode worker has survived a step with it."""
        self._num_steps += 1
        if self._num_steps >= PROVEN_AFTER_STEPS:
            self.strikes, self._proven = 0, True

    def would_convict(self, loss: WorkerLost) -> bool:
        """Whether this death, if it is one, is the last that is needed."""
        return not self._proven and loss.alone and self.strikes + 1 >= MAX_STRIKES

    def strike(self, loss: WorkerLost) -> bool:
        """A worker died under it; True if it is convicted."""
        convicted = self.would_convict(loss)
        if self._proven:
            self._proven = self._num_steps >= PROVEN_AFTER_STEPS
            self.strikes = 0 if self._proven else 1
        else:
            self.strikes = MAX_STRIKES if convicted else 1
        return convicted

    def check(self) -> None:
        """Nobody is both proven and suspected."""
        assert 0 <= self.strikes <= MAX_STRIKES
        assert not (self._proven and self.strikes)


def losses(identity: pb.WorkerIdentity, suspicions: Iterable[Suspicion]) -> list[WorkerLost]:
    """What the requests on a worker that is gone are told, in their order."""
    there = list(suspicions)
    num_suspects = sum(each.is_suspect for each in there)
    return [WorkerLost(identity, alone=num_suspects <= int(each.is_suspect)) for each in there]


class Quarantine:
    """Which requests have been convicted lately."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._until: OrderedDict[bytes, float] = OrderedDict()

    def admit(self, prompt_token_ids: Sequence[int], sampling: pb.SamplingParams) -> None:
        """Raise Quarantined for one that has."""
        if not self._until:
            return
        until_s = self._until.get(fingerprint(prompt_token_ids, sampling), 0.0)
        left_s = until_s - self._clock.now()
        if left_s > 0:
            raise Quarantined(
                f"workers died twice of this very request; it is refused for another {left_s:.0f} s",
                field="prompt",
            )

    def convict(self, prompt_token_ids: Sequence[int], sampling: pb.SamplingParams) -> None:
        """Refuse it from now on."""
        name = fingerprint(prompt_token_ids, sampling)
        self._until[name] = self._clock.now() + QUARANTINE_S
        self._until.move_to_end(name)
        if len(self._until) > MAX_QUARANTINED:
            self._until.popitem(last=False)


def fingerprint(prompt_token_ids: Sequence[int], sampling: pb.SamplingParams) -> bytes:
    """Equal for requests that ask for the same, whatever their seed."""
    asked = pb.SamplingParams()
    asked.CopyFrom(sampling)
    asked.ClearField("seed")
    prompt = array("I", prompt_token_ids).tobytes()
    return hashlib.sha256(prompt + asked.SerializeToString(deterministic=True)).digest()
