"""Both pumps with all their threads in one process, over the local transport and over gloo."""

import os
import queue
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch

from kvtransfer.actions import Granted, TransferCommitted, TransferFailed
from kvtransfer.errors import TransportBroken
from kvtransfer.states import TransferState
from kvtransfer.transports.faulty import FaultyTransport
from kvtransfer.transports.gloo import GlooTransport
from kvtransfer.transports.local import local_pair
from kvtransfer.transports.mapped import MappedTransport
from kvtransfer.transports.shm import HostSharing
from tests.integration.kv_services import (
    SLAB_BYTES,
    WELCOME,
    Control,
    ReceiverService,
    SenderService,
    slabs_of,
)
from tests.unit.kvtransfer.harness import ONE_CELL


def opened_pair(open_rank, timeout_s=3.0):
    """Two ranks in this process; `open_rank(rank, exchange)`."""
    mail = [queue.SimpleQueue(), queue.SimpleQueue()]

    def exchange(rank, blob):
        mail[1 - rank].put(blob)
        return mail[rank].get(timeout=timeout_s)

    with ThreadPoolExecutor(2) as executor:
        return tuple(executor.map(lambda rank: open_rank(rank, partial(exchange, rank)), (0, 1)))


def gloo_pair(timeout_s=3.0):
    def open_rank(rank, exchange):
        return GlooTransport.open(rank, exchange, slabs_of(rank), timeout_s=timeout_s)

    return opened_pair(open_rank, timeout_s)


def shm_pair(sharing=None):
    def open_rank(rank, exchange):
        return MappedTransport.open(rank, exchange, sharing or HostSharing(), WELCOME.num_slabs, SLAB_BYTES)

    return opened_pair(open_rank)


def in_process_pair(timeout_s=3.0):
    return local_pair((slabs_of(0), slabs_of(1)), timeout_s)


class Pair:
    """Sender and receiver services joined by control queues."""

    def __init__(self, transports, faults=None, slow_s=0.0):
        self.down, self.up = Control(), Control()
        self.sender = SenderService(transports[0], self.down.queue.put)
        receiving = FaultyTransport(transports[1], faults) if faults else transports[1]
        self.receiver = ReceiverService(receiving, self.up.queue.put, slow_s=slow_s)
        self.down.start(self.receiver.pump.on_message)
        self.up.start(self.sender.pump.on_message)
        # With one end its control stream ends, and with that the other end.
        self.sender.events.on_failed = self.receiver.pump.fail
        self.receiver.events.on_failed = self.sender.pump.fail
        self.sender.pump.start()
        self.receiver.pump.start()

    def check(self):
        for pump in (self.sender.pump, self.receiver.pump):
            with pump.lock:
                pump.link.check()

    def require_equal(self, transfer_id, first=0):
        source, target = self.sender.tables[transfer_id], self.receiver.tables[transfer_id]
        assert torch.equal(self.sender.pool[:, :, source[first:]], self.receiver.pool[:, :, target[first:]])

    def stop(self):
        self.sender.pump.stop()
        self.receiver.stop()
        self.down.stop()
        self.up.stop()


PAIRS = {"local": in_process_pair, "gloo": gloo_pair, "shm": shm_pair}


@pytest.fixture(params=PAIRS)
def pair(request):
    made = []

    def make(**options):
        made.append(Pair(PAIRS[request.param](), **options))
        return made[-1]

    yield make
    for one in made:
        one.stop()


def blocks_for(number, count=8):
    return random.Random(number).sample(range(number * count, (number + 1) * count), count)


def test_many_transfers_arrive_equal_through_a_slow_receiver(pair):
    link = pair(slow_s=0.001)
    for number in range(6):
        link.receiver.reserve(bytes([number]), blocks_for(number), num_cached_tokens=4 * (number % 3))
        link.sender.transfer(bytes([number]), blocks_for(5 - number))
    link.sender.events.wait_ended(6)
    link.check()
    assert sorted(link.sender.events.ids(TransferCommitted)) == [bytes([n]) for n in range(6)]
    for number in range(6):
        link.require_equal(bytes([number]), first=number % 3)
    cached = [block for n in range(6) for block in link.receiver.tables[bytes([n])][: n % 3]]
    assert (link.receiver.pool[:, :, cached] == -1.0).all()
    statistics = link.receiver.pump.statistics()
    assert statistics.frames == link.sender.pump.statistics().frames
    assert statistics.committed == 6
    assert link.receiver.pump.link.num_free_slabs == WELCOME.num_slabs


def test_cancelled_transfers_leave_the_others_alone(pair):
    link = pair(slow_s=0.002)
    for number in range(6):
        link.receiver.reserve(bytes([number]), blocks_for(number))
        link.sender.transfer(bytes([number]), blocks_for(number))
    link.sender.wait_granted(b"\x05")
    link.sender.pump.cancel(b"\x00")
    link.receiver.pump.cancel(b"\x01")
    # The sender's blocks are gone without a cancel: gather finds out.
    link.sender.tables.pop(b"\x02")
    link.sender.events.wait(lambda e: {b"\x03", b"\x04", b"\x05"} <= set(e.ids(TransferCommitted)))
    for number in (3, 4, 5):
        link.require_equal(bytes([number]))
    link.receiver.events.wait(lambda e: all(link.receiver.pump.state_of(bytes([n])) for n in range(6)))
    assert not link.sender.events.failures + link.receiver.events.failures


@pytest.mark.parametrize(
    ("pair", "fault"),
    [("local", "flip"), ("local", "truncate"), ("gloo", "flip"), ("gloo", "truncate"), ("shm", "flip")],
    indirect=["pair"],
)
def test_damaged_frames_fail_their_transfer_and_the_link_goes_on(pair, fault):
    link = pair(faults={1: fault})
    link.receiver.slabs[0].fill_(9)
    for number in range(2):
        link.receiver.reserve(bytes([number]), blocks_for(number))
        link.sender.transfer(bytes([number]), blocks_for(number))
        link.sender.events.wait_ended(number + 1)
    assert link.sender.events.ids(TransferFailed) == [b"\x00"]
    assert link.sender.events.ids(TransferCommitted) == [b"\x01"]
    link.require_equal(b"\x01")
    assert link.receiver.pump.statistics().checksum_errors == 1


def test_a_broken_transport_fails_both_pumps_exactly_once(pair):
    link = pair(faults={2: "break"}, slow_s=0.001)
    link.receiver.reserve(b"a", blocks_for(0))
    link.sender.transfer(b"a", blocks_for(0))
    for events in (link.sender.events, link.receiver.events):
        events.wait(lambda e: e.failures and e.ids(TransferFailed) == [b"a"])
    link.sender.pump.fail("again")
    link.receiver.pump.fail("again")
    link.stop()
    assert len(link.sender.events.failures) == len(link.receiver.events.failures) == 1
    assert link.receiver.pump.state_of(b"a") is TransferState.ABORTED


def test_a_violation_retires_the_epoch(pair):
    link = pair()
    link.down.queue.put(replace(ONE_CELL, ticket=99))
    link.receiver.events.wait(lambda e: e.failures)
    assert "99" in link.receiver.events.failures[0]
    # The sender learns it from its transport.
    link.sender.events.wait(lambda e: e.failures)


def test_a_deliberate_stop_is_no_failure_and_ends_the_open_transfers(pair):
    link = pair()
    link.sender.pump.offer(b"a", 4)
    started = time.monotonic()
    link.sender.pump.stop()
    assert time.monotonic() - started < 1
    assert link.sender.events.ids(TransferFailed) == [b"a"]
    assert link.sender.events.failures == []
    assert not link.sender.events.ids(Granted)


@pytest.mark.parametrize("make", [in_process_pair, gloo_pair])
def test_a_receive_without_a_send_times_out_and_kills_the_transport(make):
    one, other = make(0.2)
    broken = threading.Event()
    other.watch(lambda reason: broken.set())
    started = time.monotonic()
    with pytest.raises(TransportBroken):
        one.recv(torch.empty(64, dtype=torch.uint8))
    assert 0.15 < time.monotonic() - started < 1
    assert broken.wait(1)
    with pytest.raises(TransportBroken):
        other.start_send(torch.zeros(64, dtype=torch.uint8)).wait()
    for end in (one, other):
        end.close()


@pytest.mark.parametrize("make", [in_process_pair, gloo_pair])
def test_close_unblocks_a_waiting_receive(make):
    one, other = make(3.0)
    ended = []

    def wait():
        with pytest.raises(TransportBroken):
            one.recv(torch.empty(64, dtype=torch.uint8))
        ended.append(True)

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.05)
    one.close()
    waiting.join(1)
    assert ended
    other.close()


def test_two_links_in_one_process_do_not_mix():
    pairs = [Pair(gloo_pair()), Pair(gloo_pair())]
    for link in pairs:
        link.receiver.reserve(b"a", blocks_for(0))
    for link in pairs:
        link.sender.transfer(b"a", blocks_for(0))
    for link in pairs:
        link.sender.events.wait_ended(1)
        link.require_equal(b"a")
    pairs[0].stop()
    # The other link lives on.
    pairs[1].receiver.reserve(b"b", blocks_for(1))
    pairs[1].sender.transfer(b"b", blocks_for(1))
    pairs[1].sender.events.wait_ended(2)
    pairs[1].require_equal(b"b")
    pairs[1].stop()


def test_links_opened_and_closed_leave_no_file_descriptors_or_threads():
    def cycle():
        link = Pair(gloo_pair())
        link.receiver.reserve(b"a", blocks_for(0))
        link.sender.transfer(b"a", blocks_for(0))
        link.sender.events.wait_ended(1)
        link.stop()

    cycle()
    fds, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(10):
        cycle()
    # A watcher that the other end woke may still be on its way out.
    deadline = time.monotonic() + 2
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= threads
    assert len(os.listdir("/proc/self/fd")) <= fds + 2


@pytest.mark.parametrize(
    "damage", [lambda b: b"", lambda b: b"\xff" * len(b), lambda b: b[:-1], lambda b: b + b"0"]
)
def test_an_address_that_is_none_is_refused(damage):
    with pytest.raises(TransportBroken):
        GlooTransport.open(0, damage, [], timeout_s=0.2)


def test_an_absent_peer_is_noticed():
    mail = queue.SimpleQueue()
    started = time.monotonic()
    with pytest.raises(queue.Empty):
        GlooTransport.open(0, lambda blob: mail.get(timeout=0.2), [], timeout_s=0.3)
    assert time.monotonic() - started < 1
