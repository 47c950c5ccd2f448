import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.request import FinishReason, RequestState
from engine.sampler import Sample

PROMPT_LENS = (1, 3, 4, 5, 16, 17, 30, 41)
DRAFTS = [
    {"speculative": "draft", "num_draft_tokens": 1},
    {"speculative": "draft", "num_draft_tokens": 4},
    {"speculative": "draft"},
    {"speculative": "draft", "num_draft_tokens": 4, "overlap": "on"},
    {"speculative": "draft", "overlap": "on"},
    {"speculative": "ngram", "num_draft_tokens": 5},
    {"speculative": "ngram"},
]
SURFACE = [
    {"temperature": 0.0},
    {"temperature": 0.3, "logprobs": 2},
    {"temperature": 0.5, "top_p": 0.8, "top_k": 7},
    {"temperature": 0.0, "repetition_penalty": 1.2},
    {"temperature": 0.4, "presence_penalty": 0.5, "frequency_penalty": 0.3, "min_tokens": 5},
    {"temperature": 0.2, "logit_bias": {7: 2.0}, "bad_words": ((5, 6), (9,)), "logprobs": 0},
    {"temperature": 0.0, "ignore_eos": False, "stop_token_ids": (11, 12, 13, 14, 15)},
    {"temperature": 0.6, "allowed_token_ids": tuple(range(3, 30)), "min_p": 0.02, "typical_p": 0.9},
]


def ids(config):
    return "-".join(map(str, config.values()))


def mixed(make_request, **common):
    return [
        make_request(prompt_len, max_tokens=20, **{**params, **common})
        for prompt_len, params in zip(PROMPT_LENS, SURFACE, strict=True)
    ]


def run(engine, requests):
    """Tokens and log-probabilities of each request, from the outputs of the steps."""
    tokens, logprobs = ({request.key: [] for request in requests} for _ in range(2))
    for request in requests:
        engine.submit(request)
    while engine.has_work():
        for output in engine.step().outputs:
            assert output.start_index == len(tokens[output.request.key])
            tokens[output.request.key] += output.token_ids
            logprobs[output.request.key] += output.logprobs or ()
    assert [tokens[request.key] for request in requests] == [r.output_token_ids for r in requests]
    assert engine.load().blocks_used == 0
    return tokens, logprobs


@pytest.mark.parametrize("config", DRAFTS, ids=ids)
def test_every_sampling_surface_gives_the_tokens_of_speculation_off(make_engine, make_request, config):
    undisturbed = run(make_engine(num_blocks=128), mixed(make_request))
    engine = make_engine(num_blocks=128, **config)
    assert run(engine, mixed(make_request)) == undisturbed
    stats = engine.speculation_stats
    assert stats.accepted_tokens <= stats.draft_tokens
    assert stats.accepted_tokens > 0 or "num_draft_tokens" not in config
    assert stats.emitted_tokens == stats.accepted_tokens + stats.num_drafts
    assert sum(stats.accepted_by_position) == stats.accepted_tokens


@pytest.mark.parametrize("config", DRAFTS, ids=ids)
def test_preemption_under_speculation_changes_no_token(make_engine, make_request, config):
    lens = (9, 20, 14, 5)
    undisturbed = make_engine(num_blocks=128).run(*(make_request(n, max_tokens=40) for n in lens))
    for preemption in ("swap", "recompute"):
        engine = make_engine(num_blocks=26, preemption_mode=preemption, **config)
        requests = [make_request(n, max_tokens=40) for n in lens]
        assert engine.run(*requests) == undisturbed


@pytest.mark.parametrize("budget", [4, 7, 16])
def test_chunked_prefill_under_speculation_changes_no_token(make_engine, make_request, budget):
    whole = make_engine(num_blocks=128).run(*map(make_request, PROMPT_LENS))
    engine = make_engine(max_num_batched_tokens=budget, speculative="draft", num_draft_tokens=3)
    assert engine.run(*map(make_request, PROMPT_LENS)) == whole


def test_a_migrated_request_goes_on_with_the_same_tokens(make_engine, make_request):
    (undisturbed,) = make_engine().run(make_request(9, repetition_penalty=1.3, min_tokens=8))
    for emitted in (1, 5, 11):
        request = make_request(9, outputs=undisturbed[:emitted], repetition_penalty=1.3, min_tokens=8)
        engine = make_engine(speculative="draft", num_draft_tokens=4)
        assert engine.run(request) == [undisturbed]


def test_a_second_turn_finds_the_draft_in_the_prefix_cache(make_engine, make_request):
    engine = make_engine(num_blocks=128, speculative="draft", num_draft_tokens=3)
    (first,) = engine.run(make_request(17, max_tokens=30, temperature=0.0))
    again = make_request(17, max_tokens=40, temperature=0.0, outputs=first)
    (whole,) = make_engine(num_blocks=128).run(make_request(17, max_tokens=40, temperature=0.0))
    engine.submit(again)
    engine.step()
    assert again.num_cached_tokens >= 40
    assert again.num_draft_computed_tokens >= again.num_computed_tokens - 2
    while engine.has_work():
        engine.step()
    assert again.output_token_ids == whole


def test_drafts_never_pass_max_tokens_or_the_context(make_engine, make_request):
    for prompt_len, max_tokens in ((5, 3), (90, 400)):
        engine = make_engine(speculative="ngram", num_draft_tokens=8, num_blocks=64)
        (tokens,) = engine.run(make_request(prompt_len, max_tokens=max_tokens, temperature=0.0))
        assert len(tokens) == min(max_tokens, 96 - prompt_len)


def test_an_end_token_inside_a_draft_is_the_last_one(make_engine, make_request):
    def outputs(**config):
        engine = make_engine(**config)
        engine.submit(make_request(5, temperature=0.0, logit_bias={9: 100.0, 8: 99.0}, **stop))
        found = []
        while engine.has_work():
            found += engine.step().outputs
        return [token for each in found for token in each.token_ids], found[-1]

    stop = {"stop_token_ids": (8,), "min_tokens": 0, "max_tokens": 12}
    for config in ({}, {"speculative": "ngram", "num_draft_tokens": 4}):
        tokens, last = outputs(**config)
        assert (len(tokens), last.finish_reason) == (12, FinishReason.LENGTH)
    stop = {"stop_token_ids": (9,), "min_tokens": 7, "max_tokens": 12}
    plain, last = outputs()
    drafted, also_last = outputs(speculative="ngram", num_draft_tokens=4)
    assert drafted == plain
    assert (last.finish_reason, last.stop_token_id) == (also_last.finish_reason, also_last.stop_token_id)


def test_a_draft_takes_no_block_that_another_request_needs(make_engine, make_request):
    for config in ({}, {"speculative": "ngram", "num_draft_tokens": 8}):
        engine = make_engine(num_blocks=28, **config)
        requests = [make_request(n, temperature=0.0, max_tokens=8) for n in (11, 12, 13, 14, 15)]
        for request in requests:
            engine.submit(request)
        while engine.has_work():
            assert not engine.step().preempted
        assert all(request.state is RequestState.FINISHED for request in requests)


def test_rejected_slots_never_enter_the_prefix_cache(make_engine, make_request):
    engine = make_engine(num_blocks=128, speculative="ngram", num_draft_tokens=8)
    tokens = engine.run(*(make_request(n, max_tokens=30, temperature=0.2) for n in PROMPT_LENS))
    fresh = make_engine(num_blocks=128)
    for prompt_len, output in zip(PROMPT_LENS, tokens, strict=True):
        args = {"max_tokens": 36, "temperature": 0.2, "outputs": output}
        assert engine.run(make_request(prompt_len, **args)) == fresh.run(make_request(prompt_len, **args))


def test_choices_and_beams_are_those_of_speculation_off(make_engine, make_request):
    def tokens(**config):
        engine = make_engine(num_blocks=128, **config)
        return engine.run(*(make_request(7, key=c, choice=c, temperature=0.5) for c in range(3)))

    assert tokens(speculative="draft", num_draft_tokens=3) == tokens()


def test_rejection_keeps_greedy_requests_exact(make_engine, make_request):
    undisturbed = run(make_engine(num_blocks=128), mixed(make_request, temperature=0.0))
    engine = make_engine(
        num_blocks=128, speculative="draft", num_draft_tokens=3, draft_acceptance="rejection"
    )
    assert run(engine, mixed(make_request, temperature=0.0)) == undisturbed


def test_rejection_emits_what_the_law_allows(make_engine, make_request):
    for speculative in ("draft", "ngram"):
        engine = make_engine(
            num_blocks=128, speculative=speculative, num_draft_tokens=3, draft_acceptance="rejection"
        )
        requests = mixed(make_request)
        tokens, logprobs = run(engine, requests)
        assert all(len(tokens[r.key]) == 20 for r in requests if r.sampling.ignore_eos)
        assert len(logprobs[3]) == 20
        assert engine.speculation_stats.accepted_tokens > 0


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_mix_gives_the_tokens_of_speculation_off(data, make_engine, make_request):
    lens = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=5, unique=True))
    params = [data.draw(st.sampled_from(SURFACE)) for _ in lens]
    config = {
        "block_size": data.draw(st.sampled_from([1, 4, 16])),
        "max_num_batched_tokens": data.draw(st.sampled_from([6, 9, 64])),
        "num_blocks": 200,
    }
    draft = data.draw(st.sampled_from(["draft", "ngram"]))
    num = data.draw(st.sampled_from([None, 1, 2, 7]))
    overlap = data.draw(st.sampled_from(["on", "off"]))

    def requests():
        return [make_request(n, max_tokens=14, **each) for n, each in zip(lens, params, strict=True)]

    undisturbed = run(make_engine(**config), requests())
    engine = make_engine(**config, speculative=draft, num_draft_tokens=num, overlap=overlap)
    assert run(engine, requests()) == undisturbed


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_the_proposer_never_decides_what_is_emitted(
    make_engine, make_request, drafted_model, monkeypatch, overlap
):
    """A draft model that gives nothing but NaN costs time only."""
    undisturbed = make_engine(num_blocks=128).run(*map(make_request, PROMPT_LENS))
    module = drafted_model.draft.module
    logits = module.logits
    monkeypatch.setattr(module, "logits", lambda hidden: torch.full_like(logits(hidden), torch.nan))
    engine = make_engine(num_blocks=128, speculative="draft", num_draft_tokens=3, overlap=overlap)
    assert engine.run(*map(make_request, PROMPT_LENS)) == undisturbed


def test_a_draft_whose_kv_came_with_the_transfer_starts_at_once(make_engine, make_request):
    config = {"speculative": "draft", "num_draft_tokens": 4, "num_blocks": 128}
    (undisturbed,) = make_engine(num_blocks=128).run(make_request(21, temperature=0.0))
    for num_groups in (1, 2):
        prefill, decode = make_engine(**config), make_engine(**config)
        source, target = (
            make_request(21, temperature=0.0, prefill_only=True),
            make_request(21, temperature=0.0),
        )
        prefill.submit(source)
        assert decode.reserve(target)
        (output,) = prefill.step().outputs
        for group in range(num_groups):
            ours, theirs = prefill.kv_cache.groups[group], decode.kv_cache.groups[group]
            theirs[:, :, target.block_tables[group]] = ours[:, :, source.block_tables[group]]
        (first,) = output.token_ids
        decode.commit_choices(target, {0: Sample(first)}, num_groups=num_groups)
        assert target.num_draft_computed_tokens == (21 if num_groups == 2 else 0)
        while decode.has_work():
            decode.step()
        assert target.output_token_ids == undisturbed
        assert decode.speculation_stats.accepted_tokens > 0
