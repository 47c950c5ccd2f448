"""The sampler against transformers' logits processors, in the order in which transformers applies them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from engine.logit_edits import edit_logits
from engine.request import Request, SamplingParams
from engine.sampler import Sampler
from engine.sampler_state import SamplerState
from engine.warpers import warp
from kernels import ops

VOCAB, EOS = 37, (2, 5)
token = st.integers(0, VOCAB - 1)
tokens = st.lists(token, min_size=1, max_size=5)

PARAMS = st.fixed_dictionaries(
    {"max_tokens": st.just(99), "temperature": st.floats(0.1, 2)},
    optional={
        "logit_bias": st.dictionaries(token, st.floats(-100, 100), max_size=5),
        "repetition_penalty": st.floats(0.5, 2),
        "bad_words": st.lists(tokens.map(tuple), max_size=6, unique=True).map(tuple),
        "min_tokens": st.integers(0, 6),
        "allowed_token_ids": st.lists(token, min_size=8, max_size=20, unique=True).map(tuple),
        "top_k": st.integers(0, VOCAB + 3),
        "top_p": st.floats(0.05, 1),
        "min_p": st.floats(0, 0.9),
        "typical_p": st.floats(0.05, 1),
    },
)


@st.composite
def requests(draw):
    return Request(
        key=0,
        # Short and of few tokens, so that words and penalties meet the sequence.
        prompt_token_ids=draw(st.lists(st.integers(0, 7), min_size=5, max_size=9)),
        output_token_ids=draw(st.lists(st.integers(0, 7), max_size=8)),
        sampling=SamplingParams(seed=draw(st.integers(0, 99)), **draw(PARAMS)),
    )


def processors(request):
    """What transformers builds from the same parameters, in `_get_logits_processor`'s order."""
    params, prompt_len = request.sampling, len(request.prompt_token_ids)
    if params.logit_bias:
        yield hf.SequenceBiasLogitsProcessor({(key,): value for key, value in params.logit_bias.items()})
    if params.repetition_penalty != 1:
        yield hf.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)
    words = [list(word) for word in params.bad_words if word not in {(eos,) for eos in EOS}]
    if words:
        yield hf.NoBadWordsLogitsProcessor(words, list(EOS))
    if params.min_tokens:
        yield hf.MinNewTokensLengthLogitsProcessor(prompt_len, params.min_tokens, list(EOS))
    if params.allowed_token_ids:
        yield hf.PrefixConstrainedLogitsProcessor(lambda *_: list(params.allowed_token_ids), 1)


def warpers(params):
    yield hf.TemperatureLogitsWarper(params.temperature)
    if params.top_k:
        yield hf.TopKLogitsWarper(params.top_k)
    if params.top_p < 1:
        yield hf.TopPLogitsWarper(params.top_p)
    if params.min_p > 0:
        yield hf.MinPLogitsWarper(params.min_p)
    if params.typical_p < 1:
        yield hf.TypicalLogitsWarper(params.typical_p)


def reference(logits, request):
    """(edited, edited and warped) logits of one row."""
    input_ids = torch.tensor([request.tokens(0, request.num_tokens)])
    edited = hf.LogitsProcessorList(processors(request))(input_ids, logits.clone())
    return edited, hf.LogitsProcessorList(warpers(request.sampling))(input_ids, edited)


def edit(logits, batch):
    states = [SamplerState(request, EOS, VOCAB) for request in batch]
    for state, request in zip(states, batch, strict=True):
        state.catch_up(request)
    logits = logits.clone()
    edit_logits(logits, list(zip(range(len(batch)), batch, states, strict=True)))
    return logits


def random_logits(num_rows, seed):
    return 3 * torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=150, deadline=None)
@given(st.lists(requests(), min_size=1, max_size=5), st.integers(0, 2**31))
def test_every_combination_equals_transformers_and_rows_do_not_mix(batch, seed):
    logits = random_logits(len(batch), seed)
    edited = edit(logits, batch)
    warped = warp(edited, [request.sampling for request in batch])
    for row, request in enumerate(batch):
        want_edited, want_warped = reference(logits[row : row + 1], request)
        torch.testing.assert_close(edited[row], want_edited[0])
        if want_edited.isfinite().any():
            torch.testing.assert_close(warped[row], want_warped[0])
    alone = [Sampler(EOS, VOCAB).sample(logits[row : row + 1], [each])[0] for row, each in enumerate(batch)]
    assert Sampler(EOS, VOCAB).sample(logits, batch) == alone


@settings(max_examples=40, deadline=None)
@given(requests(), st.lists(token, max_size=30), st.integers(0, 2**31))
def test_state_that_grows_with_the_sequence_equals_state_from_scratch(request, further, seed):
    grown = SamplerState(request, EOS, VOCAB)
    for token_id in further:
        grown.catch_up(request)
        request.output_token_ids.append(token_id)
    grown.catch_up(request)
    logits = random_logits(1, seed)
    rebuilt = edit(logits, [request])
    edit_logits(logits, [(0, request, grown)])
    torch.testing.assert_close(logits, rebuilt, rtol=0, atol=0)


def test_draws_follow_the_warped_distribution():
    """Chi-squared: truncation and penalties leave the noise alone."""
    params = {"temperature": 2.0, "top_p": 0.95, "typical_p": 0.9, "repetition_penalty": 1.3}
    batch = [
        Request(
            key=0,
            prompt_token_ids=[1, 2, 3],
            sampling=SamplingParams(max_tokens=9, seed=seed, bad_words=((4,),), **params),
        )
        for seed in range(4000)
    ]
    logits = random_logits(1, 1) / 2
    drawn = torch.tensor(
        [each.token_id for each in Sampler(EOS, VOCAB).sample(logits.expand(len(batch), -1), batch)]
    )
    probs = reference(logits, batch[0])[1][0].softmax(0)
    kept = probs > 0
    counts = drawn.bincount(minlength=VOCAB)
    assert counts[~kept].sum() == 0
    expected = probs[kept] * len(batch)
    # 2.5 times the degrees of freedom is above the 0.999 quantile of chi-squared from 13 on.
    assert kept.sum() > 13
    assert float(((counts[kept] - expected) ** 2 / expected).sum()) < 2.5 * (int(kept.sum()) - 1)


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 100])
def test_bit_masks_of_any_width(vocab_size):
    generator = torch.Generator().manual_seed(vocab_size)
    allowed = torch.rand(3, vocab_size, generator=generator) < 0.5
    weights = 2 ** torch.arange(32, dtype=torch.int64)
    padded = torch.zeros(3, -(-vocab_size // 32) * 32, dtype=torch.int64)
    padded[:, :vocab_size] = allowed
    masks = (padded.view(3, -1, 32) * weights).sum(-1).to(torch.uint32).view(torch.int32)
    logits = torch.zeros(5, vocab_size)
    ops.apply_bit_mask(logits, torch.tensor([4, 0, 1]), masks)
    want = torch.zeros(5, vocab_size)
    want[[4, 0, 1]] = torch.where(allowed, 0.0, -torch.inf)
    assert torch.equal(logits, want)
