"""The group of ranks on GPUs, around a fake communicator: what is watched, and what is refused."""

import threading
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch._C import _DistBackendError

from engine.config import EngineConfig
from engine.engine import Engine
from engine.loader import load_model
from engine.parallel import leader, nccl
from engine.parallel.errors import RankLost
from engine.parallel.leader import Leader
from engine.parallel.nccl import NcclGroup
from engine.parallel.shard import Shard
from kernels.triton_launch import INTERPRETED
from runtime.clock import ManualClock
from tests.fakes.gpu_runtime import gpu

TIMEOUT_S = 5.0


class Communicator:
    """Operations that are started; nothing is computed."""

    def __init__(self):
        self.started = []
        self.num_aborts = 0
        self.aborted = threading.Event()
        self.error = None

    def allreduce(self, tensors, options):
        self._start("allreduce", options)

    def broadcast(self, tensors, options):
        assert options.rootRank == 0
        self._start("broadcast", options)

    def gather(self, outputs, inputs, options):
        assert options.rootRank == 0
        self._start("gather", options)
        for part in outputs[0] if outputs else ():
            part.copy_(inputs[0])

    def _start(self, name, options):
        assert not options.asyncOp, "on the current stream"
        assert not self.aborted.is_set()
        if self.error is not None:
            raise self.error
        self.started.append(name)

    def abort(self):
        self.num_aborts += 1
        self.aborted.set()


class Device:
    """Events in the order of their recording; the first `num_done` are behind what has ended."""

    def __init__(self):
        self.events = []
        self.num_done = 0
        self.is_capturing = False

    def event(self):
        return Event(self)


class Event:
    def __init__(self, device):
        self._device = device

    def record(self):
        assert not self._device.is_capturing
        self._device.events.append(self)

    def query(self):
        return self in self._device.events[: self._device.num_done]


@pytest.fixture
def device(monkeypatch):
    fake = Device()
    monkeypatch.setattr(torch.cuda, "Event", fake.event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: fake.is_capturing)
    monkeypatch.setattr(nccl, "LOOK_S", 3600.0)
    return fake


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def communicator():
    return Communicator()


@pytest.fixture
def group(device, communicator, clock):
    made = NcclGroup(communicator, Shard(0, 2), TIMEOUT_S, clock)
    yield made
    made.close()


OPERATIONS = {
    "allreduce": lambda group: group.all_reduce(torch.ones(3)),
    "gather": lambda group: group.gather(torch.ones(3)),
    "broadcast": lambda group: group.broadcast(torch.ones(3)),
}


def replay(group):
    with group.replaying():
        pass


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_event_stands_behind_each_operation(group, device, communicator, name):
    OPERATIONS[name](group)
    assert communicator.started == [name]
    assert len(device.events) == 1


def test_others_than_rank_0_gather_nothing(device, communicator, clock):
    group = NcclGroup(communicator, Shard(1, 2), TIMEOUT_S, clock)
    assert group.gather(torch.ones(3)) is None
    group.close()


@pytest.mark.parametrize("start", [*OPERATIONS.values(), replay])
def test_what_is_overdue_ends_the_group(group, device, communicator, clock, start):
    """What was started before it has ended in time, and the time counts from the start."""
    start(group)
    clock.advance(TIMEOUT_S)
    start(group)
    device.num_done = 1
    clock.advance(TIMEOUT_S)
    group.look()
    group.check()
    clock.advance(0.1)
    group.look()
    assert communicator.aborted.wait(2)
    num_started = len(communicator.started)
    for refused in (group.check, lambda: start(group), lambda: replay(group)):
        with pytest.raises(RankLost, match="was aborted"):
            refused()
    assert len(communicator.started) == num_started
    group.close()
    assert communicator.num_aborts == 1


def test_who_may_be_late_at_the_start_may_not_be_later(group, device, communicator, clock):
    group.set_timeout(10 * TIMEOUT_S)
    replay(group)
    clock.advance(9 * TIMEOUT_S)
    group.look()
    group.check()
    group.set_timeout(TIMEOUT_S)
    group.look()
    assert communicator.aborted.wait(2)


def test_what_has_ended_in_time_is_forgotten(group, device, clock):
    for start in (*OPERATIONS.values(), replay):
        start(group)
    device.num_done = len(device.events)
    clock.advance(2 * TIMEOUT_S)
    group.look()
    group.check()


def test_nothing_in_a_capture_is_watched(group, device, communicator, clock):
    device.is_capturing = True
    for start in OPERATIONS.values():
        start(group)
    device.is_capturing = False
    clock.advance(2 * TIMEOUT_S)
    group.look()
    group.check()
    assert communicator.started == list(OPERATIONS)
    assert not device.events


@pytest.mark.parametrize("start", OPERATIONS.values())
def test_an_error_of_nccl_is_a_lost_rank(group, communicator, start):
    communicator.error = _DistBackendError("NCCL error: remote process exited\nstack")
    with pytest.raises(RankLost, match=r"NCCL: NCCL error: remote process exited$"):
        start(group)


@pytest.mark.skipif(not INTERPRETED, reason="there is a real one")
def test_captured_and_overlapped_steps_of_a_rank(
    draft_checkpoint, communicator, clock, make_request, tmp_path, monkeypatch
):
    """On the GPU of tests.fakes, as the leader of nobody else: nothing in a capture is recorded, looked at or
    waited for, and each step is one replay."""

    def tokens(engine):
        request = make_request(5, max_tokens=4)
        engine.submit(request)
        while engine.has_work():
            engine.step()
        return request.output_token_ids

    config = EngineConfig(num_blocks=40, block_size=4, max_num_seqs=1)
    expected = tokens(Engine(config, load_model(draft_checkpoint, config)))
    monkeypatch.setattr(nccl, "LOOK_S", 3600.0)
    with gpu() as fake:
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: fake.capture is not None)
        group = NcclGroup(communicator, Shard(), TIMEOUT_S, clock)
        monkeypatch.setattr(leader, "open_group", lambda *args: group)
        on_gpu = replace(config, device="cuda:0")
        ranks = Leader([], tmp_path / "ranks" / "store", torch.device("cuda:0"))
        engine = Engine(on_gpu, load_model(draft_checkpoint, on_gpu, ranks=ranks))
        num_started = len(communicator.started)
        assert Counter(communicator.started[-5:]) == {"allreduce": 3, "gather": 1, "broadcast": 1}
        assert tokens(engine) == expected
        eager = communicator.started[num_started:]
        assert eager.count("gather") == 1, "of the prompts; steps are replayed"
        group.look()
        clock.advance(2 * TIMEOUT_S)
        group.look()
        group.check()
        group.close()
        with pytest.raises(RankLost, match="was aborted"):
            tokens(engine)
        ranks.close()


def test_a_replay_that_fails_is_not_watched(group, device):
    with pytest.raises(ValueError, match="ours"), group.replaying():
        raise ValueError("ours")
    assert not device.events
