"""The prefix cache changes what is computed, never what comes out: against the same engine without it."""

import hashlib
from types import SimpleNamespace

import pytest
import torch

from engine.block_keys import content_keys
from engine.config import EngineConfig
from engine.loader import load_model
from engine.request import FinishReason, Request, SamplingParams
from tests.unit.engine.test_engine import transfer

SHARED = torch.randint(3, 61, (33,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture
def ask():
    """A request that starts with the first tokens of SHARED."""

    def make(num_shared, own=(), *, key=None, salt=b"", prefill_only=False, **sampling):
        defaults = {"max_tokens": 9, "temperature": 0.9, "seed": num_shared, "ignore_eos": True}
        return Request(
            key=object() if key is None else key,
            prompt_token_ids=[*SHARED[:num_shared], *own],
            sampling=SamplingParams(**{**defaults, **sampling}),
            cache_salt=salt,
            prefill_only=prefill_only,
        )

    return make


@pytest.fixture
def plain(make_engine):
    """Tokens of requests without the cache, each alone."""

    def run(*requests):
        return [make_engine(prefix_cache=False).run(request)[0] for request in requests]

    return run


def wave(ask):
    """Requests that share prefixes of several lengths, some whole, greedy and seeded."""
    lengths = (33, 32, 17, 16, 8, 33, 5, 20)
    return [
        ask(num_shared, own=[3 + n] * (n % 3), temperature=0.0 if n % 2 else 1.1)
        for n, num_shared in enumerate(lengths)
    ]


@pytest.mark.parametrize("budget", [5, 12, 2048])
def test_shared_prefixes_give_the_tokens_of_the_uncached_run(make_engine, ask, plain, budget):
    expected = plain(*wave(ask))
    engine = make_engine(num_blocks=128, max_num_batched_tokens=budget)
    assert engine.run(*wave(ask)) == expected, "together"
    assert engine.kv_cache.tables.stats.hits > 0 or budget == 2048
    again = wave(ask)
    assert engine.run(*again) == expected, "a second time"
    assert all(request.num_cached_tokens >= (request.num_tokens - 10) // 4 * 4 for request in again)


def test_a_request_that_comes_while_another_is_prefilled_shares_its_chunks(make_engine, ask):
    engine = make_engine(max_num_batched_tokens=10)
    first, second = ask(33, key="first"), ask(33, own=[7], key="second")
    engine.submit(first)
    engine.step()
    engine.step()
    engine.submit(second)
    while engine.has_work():
        engine.step()
    assert second.num_cached_tokens == 28, "the first one's last chunk ran in the step that admitted it"


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_preemption_with_shared_blocks_changes_no_token(make_engine, ask, plain, mode):
    def requests():
        return [ask(33, own=[n], max_tokens=30, temperature=n % 2) for n in range(3, 8)]

    engine = make_engine(num_blocks=26, preemption_mode=mode)
    running = requests()
    for request in running:
        engine.submit(request)
    preempted = set()
    while engine.has_work():
        preempted |= {item.mode.value for item in engine.step().preempted}
    assert preempted == {mode}
    assert [request.output_token_ids for request in running] == plain(*requests())


def test_the_next_turn_finds_prompt_and_output_of_the_last(make_engine, ask, plain):
    engine = make_engine()
    (answer,) = engine.run(ask(18))
    turn = [*answer, 5, 6, 7]
    follow_up = ask(18, own=turn)
    assert [engine.run(follow_up)[0]] == plain(ask(18, own=turn))
    # The last token of the answer was never computed: 18 + 9 - 1 tokens are 6 full blocks.
    assert follow_up.num_cached_tokens == 24


def test_a_whole_hit_computes_the_last_block_again(make_engine, ask):
    engine = make_engine()
    for num_tokens in (32, 33):
        engine.run(ask(num_tokens, max_tokens=1))
    for num_tokens, cached in ((32, 28), (33, 32), (3, 0), (4, 0), (5, 4)):
        request = ask(num_tokens, max_tokens=1)
        engine.submit(request)
        engine.step()
        assert request.num_cached_tokens == cached


def test_salts_share_nothing_and_change_no_token(make_engine, ask):
    engine = make_engine(num_blocks=128)
    (expected,) = engine.run(ask(33, salt=b"one"))
    for salt, cached in ((b"two", 0), (b"", 0), (b"one", 32), (b"two", 32)):
        request = ask(33, salt=salt)
        assert engine.run(request) == [expected]
        assert request.num_cached_tokens == cached


def test_a_hash_of_eight_bits_gives_the_right_tokens(make_engine, ask, plain):
    engine = make_engine(num_blocks=1024)
    engine.kv_cache.tables._keys = content_keys(4, lambda content: hashlib.sha256(content).digest()[:1])
    requests = [ask(0, own=[3 + n % 50, 3 + n // 50, 9, 9, n % 7 + 3], max_tokens=2) for n in range(600)]
    for first in range(0, 600, 100):
        engine.run(*requests[first : first + 100])
    assert engine.load().blocks_cached < 300, "digests have collided"
    repeated = [ask(0, own=r.prompt_token_ids, max_tokens=2, seed=0) for r in requests[::24]]
    engine.run(*repeated)
    expected = [r.output_token_ids for r in requests[::24]]
    assert [request.output_token_ids for request in repeated] == expected
    assert expected[:5] == plain(*(ask(0, own=r.prompt_token_ids, max_tokens=2) for r in requests[:97:24]))


def send_missing(prefill, decode, computed, reserved):
    """What a link does: the blocks behind the receiver's cached ones."""
    num_cached = reserved.num_cached_tokens // 4
    missing = [
        SimpleNamespace(block_tables=[table[num_cached:] for table in request.block_tables])
        for request in (computed, reserved)
    ]
    transfer(prefill, decode, *missing)
    return len(missing[0].block_tables[0])


def test_a_split_run_moves_what_is_missing_and_gives_the_tokens_of_one(make_engine, ask, plain):
    sequences = [(33, []), (32, []), (20, [4] * 9)]
    expected = plain(*(ask(*sequence) for sequence in sequences))
    prefill, decode = make_engine(max_num_batched_tokens=8), make_engine()
    moved = []
    for sequence, tokens in [*zip(sequences, expected, strict=True)] * 2:
        computed, reserved = ask(*sequence, prefill_only=True), ask(*sequence)
        prefill.submit(computed)
        assert decode.reserve(reserved)
        while prefill.has_work():
            outputs = prefill.step().outputs
        moved.append(send_missing(prefill, decode, computed, reserved))
        decode.commit(reserved, outputs[0].token_ids[0], None)
        prefill.release(computed.key)
        assert decode.run_beside() == []
        assert reserved.output_token_ids == tokens
    assert moved == [9, 0, 3, 1, 0, 1]
    assert decode.load().blocks_used == prefill.load().blocks_used == 0


def test_a_reservation_that_is_given_up_leaves_no_block_behind(make_engine, ask):
    engine = make_engine()
    request = ask(33)
    assert engine.reserve(request)
    engine.abort(request.key)
    assert (engine.load().blocks_used, engine.load().blocks_cached) == (0, 0)


def test_pinned_blocks_are_not_evicted(make_engine, ask, make_request):
    engine = make_engine(num_blocks=24)
    engine.run(ask(32))
    reserved = ask(32)
    assert engine.reserve(reserved)
    assert reserved.num_cached_tokens == 32
    pinned = engine.kv_cache.groups[0][:, :, reserved.block_tables[0]].clone()
    for prompt_len in (40, 41, 42):
        engine.run_beside(make_request(prompt_len))
    assert engine.kv_cache.tables.stats.evicted_blocks > 0
    assert torch.equal(engine.kv_cache.groups[0][:, :, reserved.block_tables[0]], pinned)


@pytest.mark.parametrize("budget", [6, 64])
def test_a_failed_request_leaves_nothing_in_the_cache(checkpoint, make_engine, ask, plain, budget):
    bias = {"logit_bias": {60: -100.0}}
    expected = plain(ask(16, **bias))
    engine = make_engine(max_num_batched_tokens=budget)
    good = engine._runner._module
    poisoned = load_model(checkpoint, EngineConfig())
    poisoned.module.embed.weight[60] = torch.nan
    engine.run(ask(16, **bias))
    engine._runner._module = poisoned.module
    bad = ask(8, own=[60] * 9, **bias)
    engine.submit(bad)
    while engine.has_work():
        outputs = engine.step().outputs
    assert outputs[0].finish_reason is FinishReason.ERROR
    assert engine.load().blocks_cached == 0
    engine._runner._module = good
    assert engine.run(ask(16, **bias)) == expected


def test_load_tells_cached_blocks_apart(make_engine, ask):
    engine = make_engine()
    request = ask(33, max_tokens=1)
    engine.run(request)
    load = engine.load()
    assert (load.blocks_used, load.blocks_cached) == (0, 8)
    assert engine.reserve(ask(33))
    load = engine.load()
    assert (load.blocks_used, load.blocks_cached, load.blocks_total) == (9, 0, 64)
    stats = engine.kv_cache.tables.stats
    assert (stats.queries, stats.hits, stats.evicted_blocks) == (66, 32, 0)


def test_the_cache_can_be_switched_off(make_engine, ask):
    engine = make_engine(prefix_cache=False)
    engine.run(ask(33))
    assert engine.load().blocks_cached == 0
    request = ask(33)
    engine.run(request)
    assert request.num_cached_tokens == 0
