"""KV heads between ranks: everything wanted arrives once, from somebody who has it, evenly."""

from collections import Counter

import pytest

from engine.parallel.shard import Shard
from kvtransfer.head_plan import HeadRange, head_ranges, stored_heads

SIZES = [1, 2, 4, 8]


def test_by_hand():
    assert head_ranges(4, 2, 1) == [HeadRange(0, 0, 0, 2), HeadRange(1, 0, 2, 2)]
    assert head_ranges(4, 1, 2) == [HeadRange(0, 0, 0, 2), HeadRange(0, 1, 2, 2)]
    assert head_ranges(2, 4, 1) == [HeadRange(0, 0, 0, 1), HeadRange(2, 0, 1, 1)]
    assert head_ranges(1, 2, 4) == [
        HeadRange(0, 0, 0, 1),
        HeadRange(1, 1, 0, 1),
        HeadRange(0, 2, 0, 1),
        HeadRange(1, 3, 0, 1),
    ]


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("sender_size", SIZES)
@pytest.mark.parametrize("receiver_size", SIZES)
def test_every_rank_gets_its_heads_once_from_who_has_them(num_kv_heads, sender_size, receiver_size):
    ranges = head_ranges(num_kv_heads, sender_size, receiver_size)
    for item in ranges:
        for rank, size in ((item.sender_rank, sender_size), (item.receiver_rank, receiver_size)):
            stored = stored_heads(num_kv_heads, rank, size)
            assert 0 <= item.offset(stored) <= len(stored) - item.num_heads
    for receiver in range(receiver_size):
        got = [
            head
            for item in ranges
            if item.receiver_rank == receiver
            for head in range(item.first_head, item.first_head + item.num_heads)
        ]
        assert got == list(stored_heads(num_kv_heads, receiver, receiver_size))
    if sender_size <= max(receiver_size, num_kv_heads):
        sent = Counter(dict.fromkeys(range(sender_size), 0))
        for item in ranges:
            sent[item.sender_rank] += item.num_heads
        assert max(sent.values()) == min(sent.values())


@pytest.mark.parametrize("num_kv_heads", [1, 2, 8])
@pytest.mark.parametrize("size", SIZES)
def test_ranks_store_what_the_engine_says(num_kv_heads, size):
    for rank in range(size):
        assert stored_heads(num_kv_heads, rank, size) == Shard(rank, size).kv_heads(num_kv_heads)
