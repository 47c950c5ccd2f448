"""Calls wait for what was queued before them, in order, and never on the thread that queues."""

import queue
import threading

import pytest
import torch

from worker.devices import use_apart
from worker.fence import AtOnce, BehindEvents, fence_for

TIMEOUT_S = 10


class FakeStream:
    """Operations of a GPU, done when the test says so."""

    def __init__(self):
        self.done = threading.Semaphore(0)
        self.recorded_by = []

    def event(self):
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, stream):
        self._stream = stream

    def record(self):
        self._stream.recorded_by.append(threading.current_thread())

    def synchronize(self):
        assert self._stream.done.acquire(timeout=TIMEOUT_S)


def test_on_a_cpu_what_returned_is_done():
    calls = []
    fence = fence_for("cpu")
    assert isinstance(fence, AtOnce)
    fence.then(lambda: calls.append(threading.current_thread()))
    assert calls == [threading.current_thread()]


def test_calls_come_behind_their_events_in_order():
    stream, entered, calls = FakeStream(), queue.SimpleQueue(), queue.SimpleQueue()
    fence = BehindEvents(stream.event, lambda: entered.put(threading.current_thread()))
    waiting = entered.get(timeout=TIMEOUT_S)
    for number in range(3):
        fence.then(lambda number=number: calls.put((number, threading.current_thread())))
    assert stream.recorded_by == [threading.current_thread()] * 3
    assert calls.empty()
    for number in range(3):
        stream.done.release()
        assert calls.get(timeout=TIMEOUT_S) == (number, waiting)
    assert calls.empty()


@pytest.mark.gpu
def test_what_a_gpu_wrote_is_there_for_other_streams():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    count, seen = torch.zeros(1 << 24, device="cuda:0"), queue.SimpleQueue()

    def read():
        use_apart("cuda:0")
        seen.put(set(count[:: 1 << 20].tolist()))

    fence = fence_for("cuda:0")
    for number in range(1, 201):
        count += 1
        if number == 100:
            fence.then(read)
    assert min(seen.get(timeout=TIMEOUT_S)) >= 100
    torch.cuda.synchronize()
    fence.then(read)
    assert seen.get(timeout=TIMEOUT_S) == {200}
