"""Which workers live and are of no use any more: a decision without I/O."""

from collections.abc import Collection

from runtime.clock import Clock

LOOK_S = 2.0
"""How often the gateway is asked who is ready."""

ANSWER_S = 2.0
"""A gateway that takes longer to answer has not been asked."""

GAP_S = LOOK_S + ANSWER_S + 1.0
"""Of a longer time without an answer nothing is known: the gateway, or we, stood still."""


class StuckWorkers:
    """Workers that were ready once, in this life, and have not been for longer than a limit.

    A worker that loads has not been ready yet, so it is never stuck. Time counts only as long as the gateway
    answers: one that stood still, or has been started again and does not answer yet, excuses all.
    """

    def __init__(self, clock: Clock, limit_s: float) -> None:
        self._clock = clock
        self._limit_s = limit_s
        self._asked_s = clock.now()
        self._served: set[int] = set()
        """Processes that have been ready."""
        self._since_s: dict[int, float] = {}
        """By process that has been and is not, when that was first seen."""

    def observe(self, alive: Collection[int], useful: Collection[int]) -> list[int]:
        """The stuck among the pids of workers that live; `useful` are those that serve, the gateway says.

        Each is named once, unless it serves again.
        """
        now = self._clock.now()
        if now - self._asked_s > GAP_S:
            self._since_s.clear()
        self._asked_s = now
        self._served = {pid for pid in alive if pid in self._served or pid in useful}
        self._since_s = {pid: self._since_s.get(pid, now) for pid in self._served if pid not in useful}
        stuck = [pid for pid, since_s in self._since_s.items() if now - since_s > self._limit_s]
        for pid in stuck:
            self._served.discard(pid)
            del self._since_s[pid]
        return stuck

    def check(self) -> None:
        """Only who has served can be missed."""
        assert self._since_s.keys() <= self._served
