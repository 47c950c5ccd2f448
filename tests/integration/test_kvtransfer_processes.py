"""Two processes over gloo or shared memory: equal bytes, killed peers, stopped peers, links built again."""

import gc
import multiprocessing
import os
import signal
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from kvtransfer.actions import TransferCommitted, TransferFailed
from kvtransfer.errors import TransportBroken
from kvtransfer.messages import Offer
from kvtransfer.states import TransferState
from kvtransfer.transports.gloo import GlooTransport
from tests.integration import kv_peer
from tests.integration.kv_services import ReceiverService
from tests.unit.kvtransfer.harness import ONE_CELL

LARGE_BYTES = 256 << 20

HEADER = replace(ONE_CELL, ticket=2, num_layers=4)


class Peer:
    """A child process and the parent's ends of its link."""

    def __init__(self, target, *args):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=target, args=(theirs, *args), daemon=True)
        self.process.start()
        theirs.close()
        self.pool = None

    def wait_ready(self):
        """The child has imported torch: from now on link timeouts are about links."""
        assert self.pipe.poll(30)
        assert self.pipe.recv() == "ready"

    def exchange(self, blob):
        assert self.pipe.poll(5)
        theirs = self.pipe.recv()
        self.pipe.send(blob)
        return theirs

    def open(self, timeout_s, kind="gloo"):
        """A fresh epoch between a new receiver here and the child's sender."""
        self.pipe.send(("open", None))
        transport = kv_peer.OPENERS[kind](1, self.exchange, timeout_s)
        receiver = ReceiverService(transport, lambda message: self.pipe.send(("message", message)))
        receiver.pump.start()
        return receiver

    def serve(self, receiver):
        """Pass the child's control messages on until its pipe ends."""

        def run():
            while True:
                try:
                    _, message = self.pipe.recv()
                except (EOFError, OSError):
                    receiver.pump.fail("the control stream ended")
                    return
                if isinstance(message, torch.Tensor):
                    self.pool = message
                else:
                    receiver.pump.on_message(message)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    def transfer(self, receiver, transfer_id, source, target):
        receiver.reserve(transfer_id, target)
        self.pipe.send(("transfer", (transfer_id, source)))

    def end(self):
        self.process.kill()
        self.process.join(5)
        self.pipe.close()


@pytest.fixture
def spawn():
    peers = []

    def start(*targets):
        """One child per (function, argument), started side by side."""
        started = [Peer(*target) for target in targets]
        peers.extend(started)
        for peer in started:
            peer.wait_ready()
        return started

    yield start
    for peer in peers:
        peer.end()


def wait_for(condition, timeout_s=5.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_blocks_arrive_equal_and_a_stopped_peer_costs_one_timeout(spawn):
    timeout_s = 0.5
    (peer,) = spawn((kv_peer.run_sender, timeout_s))
    receiver = peer.open(timeout_s)
    peer.serve(receiver)
    source, target = [5, 3, 60, 0, 17, 9], [1, 2, 63, 40, 41, 7]
    peer.transfer(receiver, b"a", source, target)
    receiver.events.wait(lambda e: e.ids(TransferCommitted) == [b"a"])
    peer.pipe.send(("pool", None))
    wait_for(lambda: peer.pool is not None)
    assert torch.equal(peer.pool[:, :, source], receiver.pool[:, :, target])

    os.kill(peer.process.pid, signal.SIGSTOP)
    stat = Path(f"/proc/{peer.process.pid}/stat")
    wait_for(lambda: stat.read_text().split()[2] == "T")
    receiver.reserve(b"b", [10, 11])
    # A stopped peer announces nothing itself: the header is one that was on its way.
    receiver.pump.on_message(Offer(transfer_id=b"b", num_tokens=8))
    receiver.pump.on_message(HEADER)
    started = time.monotonic()
    receiver.events.wait(lambda e: e.failures)
    assert receiver.events.failed_at - started < timeout_s + 0.3
    assert receiver.events.ids(TransferFailed) == [b"b"]
    os.kill(peer.process.pid, signal.SIGCONT)
    receiver.stop()


def has_frames(pump, count):
    return pump.statistics().frames > count


def mapped_segments():
    return Path("/proc/self/maps").read_text().count("memfd:tandem-kv")


ON_GPUS = [pytest.param(name, marks=pytest.mark.gpu) for name in ("cuda_ipc", "nccl")]


@pytest.mark.parametrize("kind", ["shm", *ON_GPUS])
def test_equal_blocks_arrive_and_nothing_is_left_of_a_killed_sender(spawn, kind):
    (peer,) = spawn((kv_peer.run_sender, 3.0, kind))
    gc.collect()  # those of links before
    before = mapped_segments(), set(os.listdir("/dev/shm"))
    receiver = peer.open(3.0, kind)
    peer.serve(receiver)
    source, target = [5, 3, 60, 0, 17, 9], [1, 2, 63, 40, 41, 7]
    peer.transfer(receiver, b"a", source, target)
    receiver.events.wait(lambda e: e.ids(TransferCommitted) == [b"a"])
    peer.pipe.send(("pool", None))
    wait_for(lambda: peer.pool is not None)
    assert torch.equal(peer.pool[:, :, source], receiver.pool[:, :, target].cpu())
    assert set(os.listdir("/dev/shm")) == before[1]

    # Killed at any moment of a transfer: it fails, or was complete; nothing in between, nothing left.
    receiver.slow_s = 0.01
    peer.transfer(receiver, b"b", source * 8, list(range(48)))
    wait_for(partial(has_frames, receiver.pump, 20))
    peer.process.kill()
    receiver.events.wait(lambda e: e.ids(TransferFailed) == [b"b"])
    # A frame that the engine thread holds is readable still; its transfer is over.
    assert receiver.pump.state_of(b"b") is TransferState.ABORTED
    receiver.stop()
    assert set(os.listdir("/dev/shm")) == before[1]
    del receiver
    gc.collect()
    assert mapped_segments() == before[0]


@pytest.mark.parametrize("kind", ["gloo", "shm", *ON_GPUS])
def test_a_killed_idle_peer_is_noticed_and_another_link_works(spawn, kind):
    first, second = spawn((kv_peer.run_sender, 3.0, kind), (kv_peer.run_sender, 3.0, kind))
    receiver = first.open(3.0, kind)
    first.serve(receiver)
    receiver.reserve(b"a", [1])
    killed = time.monotonic()
    first.process.kill()
    receiver.events.wait(lambda e: e.failures)
    assert receiver.events.failed_at - killed < 0.3
    assert receiver.events.ids(TransferFailed) == [b"a"]
    receiver.stop()
    assert time.monotonic() - killed < 1
    again = second.open(3.0, kind)
    second.serve(again)
    second.transfer(again, b"b", [1, 2], [3, 4])
    again.events.wait(lambda e: e.ids(TransferCommitted) == [b"b"])
    again.stop()


@pytest.mark.parametrize("direction", ["receive", "send"])
def test_a_peer_killed_in_mid_message_is_noticed_by_the_canary(spawn, direction):
    target = kv_peer.send_one_large_message if direction == "receive" else kv_peer.receive_one_large_message
    (peer,) = spawn((target, LARGE_BYTES))
    transport = GlooTransport.open(1, peer.exchange, [], timeout_s=1.0)
    noticed, ended = threading.Event(), threading.Event()
    transport.watch(lambda reason: noticed.set())
    buffer = torch.zeros(LARGE_BYTES, dtype=torch.uint8)

    def move():
        wait = transport.recv if direction == "receive" else lambda view: transport.start_send(view).wait()
        with pytest.raises(TransportBroken):
            wait(buffer)
        ended.set()

    threading.Thread(target=move, daemon=True).start()
    if direction == "receive":
        wait_for(lambda: buffer[0] == 1)
    else:
        # Hundreds of milliseconds' worth of bytes; nobody here sees how far they are.
        time.sleep(0.03)
    killed = time.monotonic()
    peer.process.kill()
    assert noticed.wait(2)
    assert time.monotonic() - killed < 0.3
    transport.close()
    # The operation in progress is not told by gloo: it ends with its own timeout.
    assert ended.wait(1.5)
    assert buffer[-1] == 0
