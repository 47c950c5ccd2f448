"""The prefix cache in real processes: what travels, what is counted, and the same tokens without it."""

import random
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.harness import Up, eventually, kv_bytes_per_token

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

BLOCK_SIZE = 16


@pytest.fixture(scope="module")
def uncached() -> Iterator[Up]:
    """A split server that keeps no block."""
    up = Up("--no-prefix-cache")
    yield up
    up.stop()


def fresh_prompt(num_tokens: int) -> list[int]:
    return [random.randrange(3, 4000) for _ in range(num_tokens)]


class Talk:
    """Requests one after the other, with the number of blocks that each of them moved."""

    def __init__(self, up: Up, **options: Any) -> None:
        self.up = up
        self.options = {"ignore_eos": True, "temperature": 0.8, "seed": 5} | options

    def _moved(self) -> float:
        name = "tandem_kv_transfer_bytes_total"
        return sum(self.up.metric(worker["http"], name) for worker in self.up.workers("prefill"))

    def _is_seen_quiet(self) -> bool:
        busy = ("requests_running", "requests_waiting")
        return not any(worker[name] for worker in self.up.state()["workers"] for name in busy)

    def ask(self, prompt: list[int], max_tokens: int) -> tuple[list[int], int, float]:
        """Output tokens, cached tokens of the usage, blocks moved."""
        eventually(self._is_seen_quiet, 5, "no load in the gateway's eyes")
        before = self._moved()
        answer = self.up.complete(prompt, max_tokens=max_tokens, **self.options)
        cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        moved = (self._moved() - before) / (BLOCK_SIZE * kv_bytes_per_token())
        return answer["choices"][0]["token_ids"], cached, moved


def test_only_missing_blocks_travel_and_the_tokens_are_those_of_no_cache(
    split: Up, colocated: Up, uncached: Up
) -> None:
    talk, local, plain = Talk(split), Talk(colocated), Talk(uncached)
    prompt = fresh_prompt(100)
    first = talk.ask(prompt, 30)
    assert first[1:] == (0, 7)
    assert local.ask(prompt, 30) == (first[0], 0, 0)
    assert plain.ask(prompt, 30) == (first[0], 0, 7)

    assert talk.ask(prompt, 30) == (first[0], 96, 1), "the last block is partly filled: it always travels"
    assert local.ask(prompt, 30) == (first[0], 96, 0)
    assert plain.ask(prompt, 30) == (first[0], 0, 7)

    # 100 + 30 - 1 computed tokens are 8 full blocks on the decode worker; the prefill worker saw the prompt.
    turn = [*prompt, *first[0], *fresh_prompt(10)]
    second = talk.ask(turn, 20)
    assert second[1:] == (96, 1)
    assert local.ask(turn, 20) == (second[0], 128, 0)
    assert plain.ask(turn, 20) == (second[0], 0, 9)

    whole = talk.ask(prompt[:96], 5)
    assert whole[1:] == (80, 0), "a whole hit moves nothing; the last token's block is computed again"
    assert plain.ask(prompt[:96], 5) == (whole[0], 0, 6)
    eventually(split.is_quiet, 2, "quiet")


def test_salts_do_not_share(split: Up) -> None:
    prompt = fresh_prompt(40)
    salted, other = Talk(split, cache_salt="one"), Talk(split, cache_salt="two")
    tokens, cached, _ = salted.ask(prompt, 4)
    assert cached == 0
    assert other.ask(prompt, 4)[:2] == (tokens, 0)
    assert Talk(split).ask(prompt, 4)[:2] == (tokens, 0)
    assert salted.ask(prompt, 4)[:2] == (tokens, 32)


def test_cached_blocks_are_counted_apart(colocated: Up) -> None:
    (worker,) = colocated.workers()
    names = [f"tandem_prefix_cache_{name}_total" for name in ("queries", "hits", "evicted_blocks")]
    talk, prompt = Talk(colocated), fresh_prompt(64)
    before = [colocated.metric(worker["http"], name) for name in names]
    for _ in range(2):
        talk.ask(prompt, 1)
    after = [colocated.metric(worker["http"], name) for name in names]
    assert [new - old for new, old in zip(after, before, strict=True)] == [128, 48, 0]
    (state,) = colocated.workers()
    assert state["blocks_used"] == 0
    assert state["blocks_cached"] == worker["blocks_cached"] + 4
