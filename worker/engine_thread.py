"""The one thread that owns the engine.

1. Others hand it commands (`post`): functions of the engine, run between steps in order of arrival.
2. After the commands it runs one engine step and `on_step` with its result; `between_steps` comes after
   the commands and again after the step, so that nothing waits for a command to be noticed.
3. With no work and no command it sleeps until a command comes.
4. Whatever escapes from a step ends the process: an engine in an unknown state serves nobody.
"""

import logging
import queue
import threading
from collections.abc import Callable
from typing import Protocol

from engine.engine import Engine, StepResult
from engine.parallel.errors import RankLost
from runtime.clock import Clock, SystemClock
from worker.step_watch import StepWatch

logger = logging.getLogger(__name__)

Command = Callable[[Engine], None]


class StepHandler(Protocol):
    """A role's part of the loop; both methods run on the engine thread."""

    def between_steps(self, engine: Engine) -> None:
        """Called whenever commands or a step may have changed the engine."""
        ...

    def on_step(self, engine: Engine, result: StepResult) -> None:
        """Called with what a step has done."""
        ...

    def num_tokens_due(self) -> int:
        """About how many tokens the next step computes; it is asked before each one."""
        ...


class EngineThread:
    """Runs an engine; owns it from `start` to `stop`."""

    def __init__(
        self,
        engine: Engine,
        handler: StepHandler,
        on_death: Callable[[str], None],
        clock: Clock | None = None,
        enter: Callable[[], None] = lambda: None,
    ) -> None:
        """`enter`: what the thread does first."""
        self._engine = engine
        self._enter = enter
        self._handler = handler
        self._on_death = on_death
        self._inbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._stopping = False
        self._clock = clock or SystemClock()
        self.watch = StepWatch(self._clock)
        self.num_steps = 0
        self.busy_s = 0.0
        """Seconds in which this thread had something to do; any thread may read it."""
        self.step_started_s = 0.0
        """When the step of which `on_step` is being told began; for that call only."""

    def start(self) -> None:
        """Begin to step."""
        self._thread.start()

    def post(self, command: Command) -> None:
        """Run `command(engine)` before the next step. Thread-safe; the depth of the inbox is bounded by
        the number of attempts and slabs, both bounded by their owners."""
        self._inbox.put(command)

    def stop(self, timeout_s: float) -> None:
        """End after the current step; waits at most `timeout_s`."""
        self._stopping = True
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            self._enter()
            while not self._stopping:
                self._step()
        except RankLost as error:
            self._on_death(f"engine: {error}")
        except Exception as error:
            logger.exception("the engine died")
            self._on_death(f"engine: {type(error).__name__}")

    def _step(self) -> None:
        woke_s = self._apply(block=not self._engine.has_work())
        self._handler.between_steps(self._engine)
        if self._engine.has_work():
            self.step_started_s = self._clock.now()
            with self.watch.step(self._handler.num_tokens_due()):
                result = self._engine.step()
                self.num_steps += 1
                self._handler.on_step(self._engine, result)
                self._handler.between_steps(self._engine)
        self.busy_s += self._clock.now() - woke_s

    def _apply(self, *, block: bool) -> float:
        """Run the commands that wait; returns when the first one was there."""
        woke_s = self._clock.now()
        try:
            command = self._inbox.get(block=block)
            woke_s = self._clock.now()
            while True:
                if command is not None:
                    command(self._engine)
                command = self._inbox.get_nowait()
        except queue.Empty:
            return woke_s
