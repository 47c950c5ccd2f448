"""How long a client may take nothing before it is taken for gone.

A timer of its own for every write would be a timer per token, so one looks at the write in hand now and then.
"""

import asyncio
from types import TracebackType

SEND_TIMEOUT_S = 30.0
"""A client that takes nothing for this long is taken for gone."""

LOOKS = 6
"""In SEND_TIMEOUT_S: a client may have a sixth more than it."""


class Patience:
    """Around the answer to one client, in the task that writes it, which it cancels: `is_over` says so."""

    def __init__(self, timeout_s: float | None = None) -> None:
        self._timeout_s = SEND_TIMEOUT_S if timeout_s is None else timeout_s
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._since_s: float | None = None
        self.is_over = False

    def __enter__(self) -> "Patience":
        self._look()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()

    def begin(self) -> None:
        """A write is in hand."""
        self._since_s = self._loop.time()

    def end(self) -> None:
        """It is done."""
        self._since_s = None

    def _look(self) -> None:
        if self._since_s is not None and self._loop.time() - self._since_s >= self._timeout_s:
            self.is_over = True
            assert self._task is not None
            self._task.cancel()
        self._timer = self._loop.call_later(self._timeout_s / LOOKS, self._look)
