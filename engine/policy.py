"""In which order requests are served.

A policy writes `Request.rank`, (band, place): queues are sorted by it, the smaller first, and the largest
loses its blocks first. Within a band nobody is interrupted for a newcomer; a request of an earlier band
takes the blocks of running ones of later bands.
"""

from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

from engine.plan import Scheduled
from engine.request import Request, RequestState
from runtime.clock import Clock, SystemClock

PolicyName = Literal["fcfs", "priority", "mlfq"]

BASE_QUANTUM_S = 0.01
QUANTUM_RATIO = 2
PROMOTION_STEPS = 1000
STARVATION_S = 3.0
"""As in the released code of FastServe."""

PROFILE_WEIGHT = 0.1
"""Of the newest step in the running mean of what a prompt token costs."""


class Policy(Protocol):
    """Ranks requests; holds no blocks and makes no choice of its own."""

    pauses: bool
    """More requests may hold blocks than a step has seats; those of the last ranks are paused."""

    def arrive(self, request: Request, num_prefill_tokens: int) -> None:
        """Rank a new request, of which so many tokens are to be computed here before it decodes."""
        ...

    def begin(self) -> None:
        """A step begins."""
        ...

    def charge(self, plan: Sequence[Scheduled], queued: Iterable[Request]) -> bool:
        """The step has computed `plan`; whether ranks of those that run or wait have changed."""
        ...


class Fcfs:
    """First come, first served; whoever is preempted keeps its place."""

    pauses = False

    def arrive(self, request: Request, num_prefill_tokens: int) -> None:
        """Behind all others."""
        request.rank = (0, request.arrival)

    def begin(self) -> None:
        """Time does not matter."""

    def charge(self, plan: Sequence[Scheduled], queued: Iterable[Request]) -> bool:
        """Ranks never change."""
        return False


class ByPriority(Fcfs):
    """The largest `Request.priority` first; among equals first come, first served."""

    def arrive(self, request: Request, num_prefill_tokens: int) -> None:
        """Behind those of the same priority."""
        request.rank = (-request.priority, request.arrival)


class Mlfq:
    """FastServe's skip-join multi-level feedback queue (Wu et al. 2023, arXiv 2305.05920).

    1. Level p has a quantum of base · ratio^p seconds. A newcomer joins the back of the first level whose
       quantum covers its prompt: on the levels above it would be demoted after its first step.
    2. Whoever has been served for longer than its level's quantum goes to the front of the next level.
    3. Every PROMOTION_STEPS steps those not served for STARVATION_S go to the front of level 0.

    A prompt's time is the mean cost per token of the steps that computed prompts, times its length.
    """

    pauses = True

    def __init__(self, clock: Clock, *, base_quantum_s: float = BASE_QUANTUM_S) -> None:
        self._clock = clock
        self._base_quantum_s = base_quantum_s
        self._prefill_s_per_token = 0.0
        self._begun_at = 0.0
        self._num_steps = 0
        # Places grow at the back of a level and shrink at the front; one pair serves all levels.
        self._front = self._back = 0

    def quantum_s(self, level: int) -> float:
        """Seconds of service that a level gives."""
        return self._base_quantum_s * float(QUANTUM_RATIO**level)

    def arrive(self, request: Request, num_prefill_tokens: int) -> None:
        """To the back of the level whose quantum covers its prompt."""
        level = 0
        while self.quantum_s(level) < num_prefill_tokens * self._prefill_s_per_token:
            level += 1
        self._back += 1
        request.rank = (level, self._back)
        request.served_at = self._clock.now()

    def begin(self) -> None:
        """What follows until `charge` is the step's time."""
        self._begun_at = self._clock.now()

    def charge(self, plan: Sequence[Scheduled], queued: Iterable[Request]) -> bool:
        """Demote those whose quantum is used up; from time to time promote the starving."""
        now = self._clock.now()
        self._profile(plan, now - self._begun_at)
        changed = False
        for item in reversed(plan):
            request, level = item.request, item.request.rank[0]
            request.served_at = now
            request.served_s += now - self._begun_at
            if request.served_s > self.quantum_s(level):
                self._to_front(request, level + 1)
                changed = True
        self._num_steps += 1
        if self._num_steps % PROMOTION_STEPS:
            return changed
        return self._promote(queued, now) or changed

    def _profile(self, plan: Sequence[Scheduled], seconds: float) -> None:
        if all(item.request.state is RequestState.RUNNING for item in plan):
            return
        num_tokens = sum(item.query_len for item in plan)
        weight = PROFILE_WEIGHT if self._prefill_s_per_token else 1.0
        self._prefill_s_per_token += weight * (seconds / num_tokens - self._prefill_s_per_token)

    def _promote(self, queued: Iterable[Request], now: float) -> bool:
        """The one that has waited longest gets to the very front."""
        starving = [request for request in queued if now - request.served_at >= STARVATION_S]
        for request in sorted(starving, key=lambda each: each.served_at, reverse=True):
            self._to_front(request, 0)
        return bool(starving)

    def _to_front(self, request: Request, level: int) -> None:
        self._front -= 1
        request.rank = (level, self._front)
        request.served_s = 0.0


def by_rank(request: Request) -> tuple[int, int]:
    """The key that all queues are sorted by."""
    return request.rank


def make_policy(name: PolicyName, clock: Clock | None = None) -> Policy:
    """The policy of that name; `clock` is the machine's if there is none."""
    if name == "mlfq":
        return Mlfq(clock or SystemClock())
    return ByPriority() if name == "priority" else Fcfs()
