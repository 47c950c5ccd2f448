"""When prompts begin to be computed and when they are done, as the engine's steps tell."""

from collections.abc import Hashable, Iterable
from typing import NamedTuple

from engine.engine import StepResult
from worker.timeline import COMPUTE, QUEUE, Timelines


class Mark(NamedTuple):
    """A moment of a prompt's computation."""

    key: Hashable
    began_s: float
    """The step that computed its first chunk."""
    done_s: float | None
    """The end of the step that computed its last; None while there is more."""


class PrefillWatch:
    """Prompts that wait for their first chunk or for their last. The engine thread's."""

    def __init__(self) -> None:
        self._queued: set[Hashable] = set()
        self._began_s: dict[Hashable, float] = {}

    def add(self, key: Hashable) -> None:
        """A prompt was queued."""
        self._queued.add(key)

    def drop(self, key: Hashable) -> None:
        """Its attempt ended; no-op if it is not watched."""
        self._queued.discard(key)
        self._began_s.pop(key, None)

    def on_step(self, result: StepResult, started_s: float, ended_s: float) -> list[Mark]:
        """What a step has changed."""
        if not self._queued and not self._began_s:
            return []
        began = [item.request.key for item in result.batch if item.request.key in self._queued]
        for key in began:
            self._queued.discard(key)
            self._began_s[key] = started_s
        ended = {output.request.key for output in result.outputs} & self._began_s.keys()
        marks = [Mark(key, started_s, None) for key in began if key not in ended]
        return marks + [Mark(key, self._began_s.pop(key), ended_s) for key in ended]


def enter(timelines: Timelines, marks: Iterable[Mark], then: str | None) -> None:
    """Put the marks into the attempts' timelines, on the event loop; `then` begins after the last chunk."""
    for key, began_s, done_s in marks:
        timelines.finish(key, QUEUE, began_s)
        timelines.begin(key, COMPUTE, began_s)
        if done_s is not None:
            timelines.finish(key, COMPUTE, done_s)
            if then is not None:
                timelines.begin(key, then, done_s)
