"""Links between workers of several ranks over real gRPC and transports, in one process, with fake engines."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch

from kvtransfer.layout import KvFacts
from kvtransfer.transport import Transport
from kvtransfer.transports.faulty import FaultyTransport
from protos.tandem.v1 import kvlink_pb2
from tests.integration.test_links import commit_three_blocks, moved, outcome, pair, send_three_blocks
from tests.unit.worker.lane_ranks import BLOCK_SIZE, HEAD_DIM, NUM_BLOCKS, NUM_LAYERS, Ranks, facts_of
from worker.lanes import follower, link_lanes
from worker.lanes.opening import Opening
from worker.lanes.transports import Exchange, open_transport
from worker.link_messages import Message, to_request, to_response

NUM_KV_HEADS = 4
WHOLE = (NUM_LAYERS, 2, NUM_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)


def facts() -> KvFacts:
    """Of the target alone."""
    return facts_of(NUM_KV_HEADS).with_groups(1)


@asynccontextmanager
async def linked(sizes: tuple[int, int], transport: str) -> AsyncIterator[Any]:
    """See `pair`; the sender's pools are filled."""
    ranks = tuple(Ranks(NUM_KV_HEADS, size) for size in sizes)
    ranks[0].fill(torch.rand(WHOLE))
    ranks[1].fill(torch.full(WHOLE, -1.0))
    try:
        async with pair(facts(), (transport, transport), facts(), ranks) as both:
            both.ranks = ranks
            yield both
    finally:
        for each in ranks:
            each.close()


def require_equal(both: Any) -> None:
    source, target = (ranks.whole(NUM_KV_HEADS) for ranks in both.ranks)
    assert torch.equal(target[:, :, :3], source[:, :, [7, 2, 9]])
    assert (target[:, :, 3:] == -1).all()


@pytest.mark.parametrize("transport", ["shm", "gloo"])
@pytest.mark.parametrize("sizes", [(2, 2), (1, 2), (4, 1)])
async def test_blocks_arrive_on_all_ranks_and_commit(sizes: tuple[int, int], transport: str) -> None:
    async with linked(sizes, transport) as both:
        await commit_three_blocks(both, layers=(1, 3))
        require_equal(both)
        assert both.senders.open_transports == {"d": transport}
        block_bytes = NUM_LAYERS * 2 * BLOCK_SIZE * NUM_KV_HEADS * HEAD_DIM * 4
        assert moved(both.sender) == moved(both.receiver) == 3 * block_bytes


@pytest.mark.parametrize("number", [0, 1])
async def test_a_wrong_byte_of_a_stripe_fails_its_transfer_alone(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(opening: Opening, exchange: Exchange, device: torch.device) -> Transport:
        transport = open_transport(opening, exchange, device)
        wrong = opening.end == 1 and opening.lane.number == number
        return FaultyTransport(transport, {0: "flip"}) if wrong else transport

    for module in (follower, link_lanes):
        monkeypatch.setattr(module, "open_transport", opened)
    async with linked((2, 2), "shm") as both:
        await send_three_blocks(both)
        kind, message = await outcome(both.owner)
        if kind == "sent":
            kind, message = await outcome(both.owner)
        assert (kind, "wrong checksum" in message) == ("failed", True)
        await commit_three_blocks(both, 2)
        require_equal(both)
        assert both.sender.metrics.links_retired._value.get() == 0


async def test_a_sender_that_knows_nothing_of_ranks_is_refused_where_it_would_have_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def without_ranks(message: Message) -> kvlink_pb2.OpenRequest:
        request = to_request(message)
        if request.HasField("hello"):
            request.hello.ClearField("num_ranks")
        return request

    monkeypatch.setattr("prefill_svc.links.to_request", without_ranks)
    async with linked((1, 2), "auto") as both:
        await send_three_blocks(both)
        kind, message = await outcome(both.owner)
        assert (kind, "this worker has 2 ranks, and the other's" in message) == ("failed", True)
        assert moved(both.sender) == moved(both.receiver) == 0
    async with linked((1, 1), "auto") as both:
        await commit_three_blocks(both)
        require_equal(both)


async def test_so_is_a_receiver(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_ranks(message: Message) -> kvlink_pb2.OpenResponse:
        response = to_response(message)
        if response.HasField("welcome"):
            response.welcome.ClearField("num_ranks")
        return response

    monkeypatch.setattr("decode_svc.links.to_response", without_ranks)
    async with linked((2, 1), "auto") as both:
        await send_three_blocks(both)
        kind, message = await outcome(both.owner)
        assert (kind, "this worker has 2 ranks, and the other's" in message) == ("failed", True)
    async with linked((1, 1), "auto") as both:
        await commit_three_blocks(both)
        require_equal(both)
