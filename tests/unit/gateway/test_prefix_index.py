"""Against a model: the set of prefixes that were sent, as token tuples."""

import random

import pytest

from gateway.prefix_index import MAX_BLOCKS, PrefixIndex, prefix_chain

BLOCK_SIZE = 4


def chain(token_ids: list[int], salt: str = "") -> list[bytes]:
    return prefix_chain(token_ids, salt, BLOCK_SIZE)


def test_chains_share_exactly_the_common_full_blocks() -> None:
    rng = random.Random(3)
    for _ in range(50):
        first, second = ([rng.randrange(2) for _ in range(rng.randrange(20))] for _ in range(2))
        index = PrefixIndex()
        index.add("boot", chain(first))
        common = 0
        while first[:common] == second[:common] and common <= min(len(first), len(second)):
            common += BLOCK_SIZE
        assert index.overlap("boot", chain(second)) == common // BLOCK_SIZE - 1
    assert len(chain([1] * 11)) == 2


def test_salts_and_boots_know_nothing_of_each_other() -> None:
    index = PrefixIndex()
    index.add("boot", chain([1] * 8, "a"))
    assert index.overlap("boot", chain([1] * 8, "a")) == 2
    assert index.overlap("boot", chain([1] * 8, "b")) == 0
    assert index.overlap("boot", chain([1] * 8)) == 0
    assert index.overlap("other", chain([1] * 8, "a")) == 0
    index.forget("boot")
    assert index.overlap("boot", chain([1] * 8, "a")) == 0
    index.forget("boot")


def test_the_ends_of_the_oldest_chains_are_forgotten_first() -> None:
    index = PrefixIndex()
    old, new = [1] * 12, [2] * 12
    for tokens in (old, new, old, [3] * 8):
        index.add("boot", chain(tokens), max_blocks=6)
    assert [index.overlap("boot", chain(tokens)) for tokens in (new, old, [3] * 8)] == [1, 3, 2]
    index.check()


@pytest.mark.parametrize("max_blocks", [3, 10 * MAX_BLOCKS])
def test_the_index_is_bounded(max_blocks: int) -> None:
    index = PrefixIndex()
    keys = [number.to_bytes(8) for number in range(MAX_BLOCKS + 5)]
    index.add("boot", keys, max_blocks)
    index.check()
    assert index.overlap("boot", keys) == min(max_blocks, MAX_BLOCKS)
