"""Suspects run one at a time, so that the death of a worker says which of them it was."""

import asyncio

from gateway.quarantine import Suspicion

TURN_WAIT_S = 2.0
"""A suspect whose turn does not come goes without: innocent ones must not starve."""

TRIAL_S = 1.0
"""A trial that takes longer lets the next one begin: a long prompt is none of the others' fault."""


class Trial:
    """One suspect's turn; `end` may be called again. Without a lock it is over from the start."""

    def __init__(self, turn: asyncio.Lock | None = None) -> None:
        self._turn = turn
        if turn is not None:
            self._timer = asyncio.get_running_loop().call_later(TRIAL_S, self.end)

    def end(self) -> None:
        """Let the next suspect begin."""
        if self._turn is not None:
            self._timer.cancel()
            self._turn.release()
            self._turn = None


class Watch:
    """One request, watched over its attempts."""

    def __init__(self, trials: "Trials") -> None:
        self.suspicion = Suspicion()
        self._trials = trials
        self._trial: Trial | None = None

    async def begin(self, deadline: float) -> None:
        """Another attempt may begin when this returns; `deadline` is on the event loop's clock."""
        self._trial = await self._trials.begin(self.suspicion, deadline)
        self.suspicion.begin()

    def settle(self) -> None:
        """Something has come: perhaps the request has proven harmless."""
        if self._trial is not None and not self.suspicion.is_suspect:
            self.end()

    def end(self) -> None:
        """The attempt is over, or was none."""
        if self._trial is not None:
            self._trial.end()
            self._trial = None


class Trials:
    """The queue of suspects of one gateway."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()

    async def begin(self, suspicion: Suspicion, deadline: float) -> Trial:
        """At once for all but suspects, who wait for their turn."""
        if not suspicion.is_suspect:
            return Trial()
        latest = asyncio.get_running_loop().time() + TURN_WAIT_S
        try:
            async with asyncio.timeout_at(min(latest, deadline)):
                await self._turn.acquire()
        except TimeoutError:
            return Trial()
        return Trial(self._turn)
