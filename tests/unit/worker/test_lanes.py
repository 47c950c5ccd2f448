"""Frames in stripes between workers of any numbers of ranks; ranks in one process, see lane_ranks."""

import itertools
import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from engine.parallel.wire import Op
from kernels import ops
from kvtransfer.errors import TransportBroken
from kvtransfer.lanes import fold_stripes, lanes_between
from kvtransfer.messages import Welcome
from kvtransfer.plan import frame_sizes
from runtime.errors import Unavailable
from tests.unit.worker.lane_ranks import (
    BLOCK_SIZE,
    DRAFT,
    HEAD_DIM,
    NUM_BLOCKS,
    NUM_LAYERS,
    NUM_SLABS,
    LocalWires,
    Ranks,
    open_both,
    parts_of,
)
from worker.lanes import open as lane_open
from worker.lanes.stripes import Piece
from worker.lanes.transports import OPENERS

SIZES = (1, 2, 4)
HEADS = (1, 2, 4, 8)
SOURCE, TARGET = [5, 0, 7], [1, 6, 2]


@pytest.fixture
def wires(monkeypatch):
    made = LocalWires()
    monkeypatch.setitem(OPENERS, "local", made)
    return made


@contextmanager
def linked(sender_size, receiver_size, num_kv_heads):
    """Ranks and lanes of both ends; the sender's pools are filled, the receiver's hold -1."""
    senders, receivers = (Ranks(num_kv_heads, size) for size in (sender_size, receiver_size))
    generator = torch.Generator().manual_seed(1)
    shape = (NUM_LAYERS, 2, NUM_BLOCKS, BLOCK_SIZE, num_kv_heads, HEAD_DIM)
    senders.fill(torch.rand(shape, generator=generator))
    receivers.fill(torch.full(shape, -1.0))
    before = threading.active_count()
    outgoing, incoming = open_both(senders, receivers, num_kv_heads)
    try:
        yield senders, receivers, outgoing, incoming
    finally:
        outgoing.close()
        incoming.close()
        while threading.active_count() > before:
            threading.Event().wait(0.001)
        for ranks in (senders, receivers):
            wait_until_served(ranks)
            ranks.close()


def piece(block_ids, first_layer=0, num_layers=NUM_LAYERS, group=0):
    return Piece(group=group, block_ids=block_ids, first_layer=first_layer, num_layers=num_layers)


def move(outgoing, incoming, source, target, slab, size_index=0):
    """One frame, as the pumps and the engine thread do it; both checksums."""
    sent = outgoing.gather(source, slab)
    pending = outgoing.start_send(source.group, size_index, slab)
    incoming.recv(target.group, size_index, slab)
    pending.wait()
    return sent, incoming.scatter(target, slab)


@pytest.mark.parametrize(("sender_size", "receiver_size"), list(itertools.product(SIZES, SIZES)))
@pytest.mark.parametrize("num_kv_heads", HEADS)
def test_blocks_arrive_as_between_single_ranks(wires, sender_size, receiver_size, num_kv_heads):
    with linked(sender_size, receiver_size, num_kv_heads) as (senders, receivers, outgoing, incoming):
        for layer in range(NUM_LAYERS):  # a frame for each, in the slabs' turn
            sent, found = move(
                outgoing, incoming, piece(SOURCE, layer, 1), piece(TARGET, layer, 1), layer % NUM_SLABS
            )
            assert sent == found
        whole, arrived = (ranks.whole(num_kv_heads) for ranks in (senders, receivers))
        assert torch.equal(arrived[:, :, TARGET], whole[:, :, SOURCE])
        others = sorted(set(range(NUM_BLOCKS)) - set(TARGET))
        assert (arrived[:, :, others] == -1).all()
        if sender_size == receiver_size == 1:
            slab = torch.empty(1 << 16, dtype=torch.uint8)
            num_bytes, _ = ops.gather_blocks_summed(whole, SOURCE, NUM_LAYERS - 1, 1, slab)
            assert sent == ops.checksum(slab[:num_bytes]), "one rank's frames are what they always were"


@pytest.mark.parametrize(("sender_size", "receiver_size"), [(1, 1), (2, 1), (2, 4)])
def test_a_draft_travels_whole_between_the_first_ranks(wires, sender_size, receiver_size):
    with linked(sender_size, receiver_size, 4) as (senders, receivers, outgoing, incoming):
        drafts = [ranks.pools[0].groups[1] for ranks in (senders, receivers)]
        drafts[0].normal_()
        for slab in range(NUM_SLABS + 1):  # beside frames of the target, which take all lanes
            group, layers = (1, DRAFT.num_layers) if slab % 2 else (0, NUM_LAYERS)
            ends = (piece(ids, 0, layers, group) for ids in (SOURCE, TARGET))
            sent, found = move(outgoing, incoming, *ends, slab % NUM_SLABS)
            assert sent == found
        assert torch.equal(drafts[1][:, :, TARGET], drafts[0][:, :, SOURCE])
        assert torch.equal(receivers.whole(4)[:, :, TARGET], senders.whole(4)[:, :, SOURCE])


@pytest.mark.parametrize(("sender_size", "receiver_size"), [(2, 2), (1, 4), (4, 1), (2, 4)])
def test_a_wrong_byte_of_any_stripe_shows_in_that_frame_alone(wires, sender_size, receiver_size):
    with linked(sender_size, receiver_size, 4) as (_, _, outgoing, incoming):
        for number, (_, receiving) in wires.pairs.items():
            flip(receiving)
            sent, found = move(outgoing, incoming, piece(SOURCE), piece(TARGET), number % NUM_SLABS)
            assert sent != found, number
            del receiving.recv
            sent, found = move(outgoing, incoming, piece(SOURCE), piece(TARGET), number % NUM_SLABS)
            assert sent == found


def flip(transport):
    """The next frame comes with a wrong bit."""
    recv = transport.recv

    def damaged(view):
        recv(view)
        view[5] ^= 1

    transport.recv = damaged


def test_exchanged_stripes_show():
    checksums = {0: 7, 1: 2**64 - 3, 2: 9}
    assert fold_stripes(checksums) != fold_stripes({0: 7, 1: 9, 2: 2**64 - 3})
    assert fold_stripes({0: 7}) == 7


@pytest.mark.parametrize(("sender_size", "receiver_size"), [(2, 2), (2, 4), (4, 1)])
@pytest.mark.parametrize("broken", [0, -1])
def test_one_broken_lane_ends_all_at_both_ends(wires, sender_size, receiver_size, broken):
    """Also whoever waits on another one; and scatters that come late find nothing."""
    with linked(sender_size, receiver_size, 4) as (_, receivers, outgoing, incoming):
        told = [threading.Event() for _ in range(2)]
        for lanes, event in zip((outgoing, incoming), told, strict=True):
            lanes.watch(lambda reason, lanes=lanes, event=event: (lanes.close(), event.set()))
        waiting = threading.Thread(target=receive_in_vain, args=(incoming,))
        waiting.start()
        list(wires.pairs.values())[broken][0].close()
        waiting.join(10)
        assert not waiting.is_alive()
        assert told[1].wait(10)
        outgoing.close()
        with pytest.raises(TransportBroken):
            outgoing.start_send(0, 0, 0)
        if receiver_size > 1:
            wait_until_served(receivers)
            assert incoming.scatter(piece(TARGET), 0) is None


def wait_until_served(ranks):
    """Until no rank has lanes any more; pytest's own timeout is the limit."""
    while any(service._links for service in ranks.services):
        threading.Event().wait(0.001)


def receive_in_vain(lanes):
    with pytest.raises(TransportBroken):
        lanes.recv(0, 0, 0)


def test_a_lane_that_cannot_be_opened_leaves_none(wires, monkeypatch):
    senders, receivers = Ranks(4, 2), Ranks(4, 2)

    def refuse(opening, exchange, device):
        if opening.lane.number == 1 and opening.end == 0:
            exchange(b"1")
            raise OSError("no memory")
        return wires(opening, exchange, device)

    monkeypatch.setitem(OPENERS, "local", refuse)
    with pytest.raises(TransportBroken, match="rank 1: local cannot be opened: no memory"):
        open_both(senders, receivers, 4)
    wait_until_served(senders)
    wait_until_served(receivers)
    with pytest.raises(TransportBroken):
        wires.pairs[0][0].start_send(torch.zeros(1, dtype=torch.uint8))
    senders.close()
    receivers.close()


def test_a_peer_that_does_not_answer_is_unavailable_and_leaves_no_lane(wires):
    receivers = Ranks(4, 2)
    welcome = Welcome(epoch=1, transport="local", frame_sizes=frame_sizes(8192), num_slabs=NUM_SLABS)
    answers = iter([b"0"])

    def exchange(blob):
        for answer in answers:
            return answer
        raise TimeoutError

    with pytest.raises(Unavailable, match="no rendezvous within"):
        lane_open._open(parts_of(receivers, 4), welcome, exchange, 1, 2)
    wait_until_served(receivers)
    with pytest.raises(TransportBroken):
        wires.pairs[0][0].start_send(torch.zeros(1, dtype=torch.uint8))
    receivers.close()


def test_no_payload_passes_the_channels_between_ranks(wires):
    """They carry block ids, checksums and addresses: as much for wide heads as for narrow ones."""

    def counted(num_kv_heads):
        wires.pairs.clear()
        with linked(2, 2, num_kv_heads) as (senders, receivers, outgoing, incoming):
            channels = senders.channels + receivers.channels
            passed = [0, 0]
            for channel in channels:
                count_bytes(channel, passed)
            move(outgoing, incoming, piece(SOURCE), piece(TARGET), 0)
            return passed

    narrow, wide = counted(2), counted(8)
    assert narrow == wide
    assert wide[0] > 0
    assert wide[1] == 0


def count_bytes(channel, passed):
    """Adds up bytes that are sent to a follower: all, and those behind a message's arrays."""
    send = channel.send

    def counting(*pieces):
        passed[0] += sum(map(len, pieces))
        passed[1] += sum(map(len, pieces[1:]))
        send(*pieces)

    channel.send = counting


@pytest.mark.parametrize("heads", [*HEADS, 12])
@pytest.mark.parametrize("sizes", list(itertools.product(SIZES, SIZES)))
def test_every_lane_holds_its_part_of_every_frame(sizes, heads):
    if any(max(heads, size) % min(heads, size) for size in sizes):
        pytest.skip("such ranks cannot share the heads")
    table = frame_sizes(4 << 20)
    welcome = Welcome(epoch=1, transport="local", frame_sizes=table, num_slabs=4, num_groups=2)
    lanes = lanes_between(heads, welcome, *sizes)
    assert (lanes[0].heads.sender_rank, lanes[0].heads.receiver_rank) == (0, 0)
    assert len({(lane.heads.sender_rank, lane.heads.receiver_rank) for lane in lanes}) == len(lanes)
    for lane in lanes:
        for index, size in enumerate(table):
            assert lane.num_bytes(0, index) * heads >= size * lane.heads.num_heads
            assert lane.num_bytes(0, index) <= lane.slab_bytes <= table[0]
        assert lane.carries(1) == (lane.number == 0)
    assert [lanes[0].num_bytes(1, index) for index in range(len(table))] == list(table)
    alone = lanes_between(heads, replace(welcome, num_groups=1), *sizes)
    assert not any(lane.carries(1) for lane in alone)
    own = [lane.slab_bytes for lane in alone if lane.heads.receiver_rank == 0]
    assert sum(own) * min(heads, sizes[1]) >= table[0]
    assert (sum(own) - 64 * len(own)) * min(heads, sizes[1]) <= table[0]


def test_the_wires_operations_are_numbered_once():
    assert len({op.value for op in Op}) == len(Op)
