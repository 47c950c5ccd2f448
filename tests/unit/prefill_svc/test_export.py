"""Which blocks travel when, and the one commit at the end."""

import pytest

from kvtransfer.messages import FirstToken
from prefill_svc.export import Export
from worker.attach import AttemptKey

TOKEN = FirstToken(choice=0, token_id=5)
LAST = FirstToken(choice=0, token_id=5, finish_reason=1)


def export(num_tokens: int) -> Export:
    return Export(key=AttemptKey(0, 1, 1), transfer_id=bytes(16), num_tokens=num_tokens, block_size=16)


@pytest.mark.parametrize(("num_tokens", "blocks"), [(1, 1), (16, 1), (17, 2), (100, 7)])
def test_a_prompt_in_one_chunk(num_tokens: int, blocks: int) -> None:
    item = export(num_tokens)
    item.advance(tuple(range(blocks)), num_tokens)
    assert item.take() == range(blocks)
    assert not item.take()


def test_a_partly_filled_block_waits_for_its_chunk() -> None:
    item = export(50)
    taken = []
    for computed in (10, 20, 47, 48, 50):
        item.advance(((9, 8, 7, 6),), computed)
        taken.append(list(item.take()))
    assert taken == [[], [0], [1], [2], [3]]


def test_commit_comes_once_and_after_the_last_block() -> None:
    item = export(20)
    item.first_tokens = (TOKEN,)
    item.advance(((1, 2),), 20)
    assert item.take_commit() is None
    item.take()
    assert item.take_commit() == (TOKEN,)
    assert item.take_commit() is None


def test_a_finished_request_commits_without_its_blocks() -> None:
    item = export(20)
    item.first_tokens = (LAST,)
    assert item.take_commit() == (LAST,)


def test_one_choice_that_goes_on_needs_all_blocks() -> None:
    item = export(20)
    item.first_tokens = (LAST, FirstToken(choice=1, token_id=6))
    assert item.take_commit() is None
    item.advance(((1, 2),), 20)
    item.take()
    assert item.take_commit() == (LAST, FirstToken(choice=1, token_id=6))
