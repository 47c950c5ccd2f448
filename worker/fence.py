"""Waits until a GPU has done what was queued on it, away from the thread that queues.

KV leaves a pool on streams of its own: who lets it leave must know that it is written. On a CPU an operation
that has returned is done.
"""

import queue
import threading
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch

from worker.devices import use as use_device

Call = Callable[[], None]


class Fence(Protocol):
    """Calls come in the order of `then`."""

    def then(self, call: Call) -> None:
        """Call when all is done that the calling thread has queued; at once, or soon from another thread."""
        ...


class Event(Protocol):
    """The part of torch.cuda.Event used here."""

    def record(self) -> None:
        """Behind what this thread has queued on its stream."""
        ...

    def synchronize(self) -> None:
        """Block until the stream is there."""
        ...


class AtOnce:
    """Nothing is queued on a CPU."""

    def then(self, call: Call) -> None:
        """See Fence."""
        call()


class BehindEvents:
    """An event for each call, and one thread that waits for them in turn.

    An error of the GPU ends that thread; it stays with the GPU, so the engine's next operation meets it too.
    """

    def __init__(self, new_event: Callable[[], Event], enter: Callable[[], None] = lambda: None) -> None:
        """`enter`: what the thread does first."""
        self._new_event = new_event
        self._waiting: queue.SimpleQueue[tuple[Event, Call]] = queue.SimpleQueue()
        threading.Thread(target=self._run, args=(enter,), name="fence", daemon=True).start()

    def then(self, call: Call) -> None:
        """See Fence."""
        event = self._new_event()
        event.record()
        self._waiting.put((event, call))

    def _run(self, enter: Callable[[], None]) -> None:
        enter()
        while True:
            event, call = self._waiting.get()
            event.synchronize()
            call()


def fence_for(device: str) -> Fence:
    """Of the streams of one device; its event lets the waiting thread sleep."""
    if torch.device(device).type == "cpu":
        return AtOnce()
    return BehindEvents(partial(torch.cuda.Event, blocking=True), partial(use_device, device))
