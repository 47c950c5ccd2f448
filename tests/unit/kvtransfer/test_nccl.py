"""The NCCL transport over a fake group: order, deadlines, aborts, and what the rendezvous tells whom."""

import os
import queue
import threading
from collections import deque

import pytest
import torch

from kvtransfer.errors import TransportBroken
from kvtransfer.transports.nccl import NcclTransport, host_id
from kvtransfer.transports.polling import Poll
from runtime.clock import ManualClock


class FakeWork:
    def __init__(self):
        self.done = False

    def is_completed(self):
        return self.done


class FakeWire:
    """Matches sends with receives by their order, as NCCL does; a work is done when both are there."""

    def __init__(self):
        self.sends, self.recvs = deque(), deque()
        self.frozen = False

    def match(self):
        while not self.frozen and self.sends and self.recvs:
            (sent, one), (received, other) = self.sends.popleft(), self.recvs.popleft()
            assert sent.numel() == received.numel()
            received.copy_(sent)
            one.done = other.done = True


class FakeGroup:
    def __init__(self, wire, rank):
        self.wire, self.rank = wire, rank
        self.aborted = threading.Event()

    def _start(self, waiting, tensors, rank):
        assert rank == 1 - self.rank
        if self.aborted.is_set():
            raise RuntimeError("NCCL communicator was aborted\nfile.cpp:1")
        work = FakeWork()
        waiting.append((tensors[0], work))
        self.wire.match()
        return work

    def send(self, tensors, rank, tag):
        return self._start(self.wire.sends, tensors, rank)

    def recv(self, tensors, rank, tag):
        return self._start(self.wire.recvs, tensors, rank)

    def abort(self):
        self.aborted.set()


def ends(on_pause=lambda: None, timeout_s=3.0):
    wire, clock = FakeWire(), ManualClock()

    def pause(seconds):
        clock.advance(seconds)
        on_pause()

    groups = [FakeGroup(wire, rank) for rank in (0, 1)]
    transports = [
        NcclTransport(
            group, rank, [torch.zeros(64, dtype=torch.uint8)] * 2, Poll(timeout_s, clock=clock, pause=pause)
        )
        for rank, group in enumerate(groups)
    ]
    return wire, clock, groups, transports


def test_frames_arrive_in_order_and_a_send_ends_with_its_receive():
    _, _, _, (sender, receiver) = ends()
    frames = [torch.full((16,), value, dtype=torch.uint8) for value in (1, 2)]
    pending = [sender.start_send(frame) for frame in frames]
    view = torch.zeros(16, dtype=torch.uint8)
    for frame in frames:
        receiver.recv(view)
        assert torch.equal(view, frame)
    for send in pending:
        send.wait()


def test_a_peer_that_does_not_come_costs_one_timeout():
    wire, clock, _, (sender, receiver) = ends(timeout_s=0.01)
    wire.frozen = True
    for wait in (lambda: receiver.recv(torch.zeros(8)), sender.start_send(torch.zeros(9)).wait):
        before = clock.now()
        with pytest.raises(TransportBroken, match=r"no progress for 0\.01 s"):
            wait()
        assert 0.01 <= clock.now() - before < 0.011


def test_close_ends_a_wait_and_aborts_once_on_another_thread():
    made = []
    wire, _, groups, made = ends(on_pause=lambda: made[1].close())
    wire.frozen = True
    with pytest.raises(TransportBroken, match="closed"):
        made[1].recv(torch.zeros(8))
    made[1].close()
    assert groups[1].aborted.wait(5)
    assert not groups[0].aborted.is_set(), "the other end is its own process's matter"
    with pytest.raises(TransportBroken, match="closed"):
        made[1].start_send(torch.zeros(8))


def test_what_nccl_refuses_is_a_broken_transport_in_one_line():
    _, _, groups, (sender, _) = ends()
    groups[0].aborted.set()
    with pytest.raises(TransportBroken, match=r"^NCCL communicator was aborted$"):
        sender.start_send(torch.zeros(8))


class FakeConnector:
    made = queue.SimpleQueue()

    def __init__(self, rank, device, one_gpu):
        self.rank = rank
        self.made.put((rank, one_gpu))
        self.joined = None

    def publish(self):
        assert self.rank == 0
        return b"id"

    def join(self, published):
        assert self.rank == 1
        self.joined = published

    def group(self):
        if self.rank == 1 and self.joined != b"id":
            raise TransportBroken("NCCL: wrong id")
        return FakeGroup(FakeWire(), self.rank)


@pytest.mark.parametrize(("gpus", "one_gpu"), [((b"a", b"a"), True), ((b"a", b"b"), False)])
def test_the_rendezvous_carries_the_id_and_tells_whether_the_gpu_is_one(gpus, one_gpu):
    mail = queue.SimpleQueue(), queue.SimpleQueue()
    opened = [None, None]

    def run(rank):
        def exchange(blob):
            mail[1 - rank].put(blob)
            return mail[rank].get(timeout=1)

        slabs = [torch.zeros(8, dtype=torch.uint8)]
        opened[rank] = NcclTransport.open(rank, exchange, slabs, gpus[rank], connector=FakeConnector)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(isinstance(transport, NcclTransport) for transport in opened)
    assert sorted(FakeConnector.made.get() for _ in range(2)) == [(0, one_gpu), (1, one_gpu)]


def test_two_processes_on_one_gpu_look_like_two_hosts_while_they_connect(monkeypatch):
    monkeypatch.setenv("NCCL_HOSTID", "mine")
    with host_id(0, one_gpu=False):
        assert os.environ["NCCL_HOSTID"] == "mine"
    with host_id(0, one_gpu=True):
        assert os.environ["NCCL_HOSTID"] == f"tandem-{os.getpid()}-0"
    assert os.environ["NCCL_HOSTID"] == "mine"
    monkeypatch.delenv("NCCL_HOSTID")
    with host_id(1, one_gpu=True):
        assert "NCCL_HOSTID" in os.environ
    assert "NCCL_HOSTID" not in os.environ
