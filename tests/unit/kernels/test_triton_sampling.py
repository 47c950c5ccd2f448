"""Noise, truncation and draws in Triton against plain torch; `-m gpu` runs the same tests compiled."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from engine.request import SamplingParams
from engine.warpers import warp
from kernels import sampling, triton_noise, triton_sampling, truncation
from kernels.truncation import Truncation

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@triton.jit
def noise_kernel(seeds_ptr, positions_ptr, choices_ptr, out_ptr, VOCAB_SIZE: tl.constexpr):
    row = tl.program_id(0)
    key = triton_noise.noise_key(
        tl.load(seeds_ptr + row), tl.load(positions_ptr + row), tl.load(choices_ptr + row)
    )
    ids = tl.arange(0, VOCAB_SIZE).to(tl.int64)
    tl.store(out_ptr + row * VOCAB_SIZE + ids, triton_noise.gumbel_noise(key, ids))


def noise_of(seeds, positions, choices, vocab_size):
    out = torch.empty(len(seeds), vocab_size, device=seeds.device)
    noise_kernel[(len(seeds),)](seeds, positions, choices, out, VOCAB_SIZE=vocab_size)
    return out


def keys(device, num_rows):
    torch.manual_seed(num_rows)
    seeds = torch.randint(-(2**63), 2**63 - 1, (num_rows,))
    positions, choices = torch.randint(0, 1 << 17, (num_rows,)), torch.arange(num_rows) % 3 + (1 << 32)
    return seeds.to(device), positions.to(device), choices.to(device)


def logits_of(device, num_rows, vocab_size, *, steps=None, scale=3.0):
    """`steps`: so many values in a unit, as of bf16; then there are ties."""
    torch.manual_seed(vocab_size)
    logits = scale * torch.randn(num_rows, vocab_size)
    return (logits if steps is None else (logits * steps).round() / steps).to(device)


PARAMS = [
    {"temperature": 0.0, "top_k": 3, "top_p": 0.5},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "min_p": 0.1},
    {"temperature": 1.0, "top_k": 50, "top_p": 0.8},
    {"temperature": 1.0, "top_k": 40, "top_p": 0.95, "min_p": 0.02},
    {"temperature": 0.5, "top_p": 0.3},
    {"temperature": 2.0, "top_k": 1},
    {"temperature": 1.0},
    {"temperature": 0.2, "top_k": 10**6, "top_p": 0.99},
    {"temperature": 1.5, "top_p": 0.0001},
    {"temperature": 1.0, "min_p": 1.0},
]


def truncation_of(device, params):
    neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    names = (("temperature", torch.float32), ("top_k", torch.int32), ("top_p", torch.float32))
    names = (*names, ("min_p", torch.float32))
    rows = [{**neutral, **row} for row in params]
    return Truncation(
        *(torch.tensor([row[name] for row in rows], dtype=dtype, device=device) for name, dtype in names)
    )


def kept_by_kernel(logits, cut):
    """bool [num_rows, vocab_size]."""
    thresholds = logits.new_empty(len(logits))
    first_ids = torch.empty(len(logits), dtype=torch.int32, device=logits.device)
    triton_sampling.truncate_launch(logits, cut, thresholds, first_ids).run()
    scores = logits / torch.where(cut.temperatures == 0, 1.0, cut.temperatures).unsqueeze(1)
    ids = torch.arange(logits.shape[1], device=logits.device)
    thresholds, first_ids = thresholds.unsqueeze(1), first_ids.unsqueeze(1)
    return (scores > thresholds) | ((scores == thresholds) & (ids >= first_ids))


def kept_by_torch(logits, cut):
    kept = truncation.truncate(logits, cut).isfinite()
    kept[cut.temperatures == 0] = True
    return kept


def slightly(cut, change):
    """The same with its borders moved by a rounding."""
    return cut._replace(
        top_ps=torch.where(cut.top_ps < 1, (cut.top_ps + change).clamp(min=0), 1.0),
        min_ps=cut.min_ps * (1 - change),
    )


def assert_same_tokens(token_ids, logits, cut, rows):
    """Or a border or a choice that is one of rounding."""
    scores = truncation.truncate(logits, cut)
    noise = sampling.gumbel_noise(*rows, logits.shape[1]) * (cut.temperatures != 0).unsqueeze(1)
    scores = torch.where((cut.temperatures == 0).unsqueeze(1), logits, scores) + noise
    best = scores.topk(2).values
    near = best[:, 0] - best[:, 1] < 1e-4
    want = truncation.draw(logits, cut, *rows)
    assert torch.equal(token_ids[~near], want[~near])
    assert near.sum() <= 1


def test_noise_is_the_references_up_to_the_rounding_of_logarithms(device):
    rows = keys(device, 2)
    ours, plain = noise_of(*rows, 1 << 15), sampling.gumbel_noise(*rows, 1 << 15)
    assert (ours - plain).abs().max() < 2e-6


def test_noise_draws_from_softmax(device):
    """One row of noise as the noise of many draws of four tokens."""
    noise = noise_of(*keys(device, 1), 1 << 16).view(-1, 4)
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5], device=device)
    counts = (logits + noise).argmax(-1).bincount(minlength=4)
    expected = logits.softmax(0) * len(noise)
    # 0.999 quantile of chi-squared with 3 degrees of freedom
    assert ((counts - expected) ** 2 / expected).sum() < 16.3


@pytest.mark.parametrize("vocab_size", [1, 49, 1000, 3000])
def test_sample_is_the_references(device, vocab_size):
    logits, rows = logits_of(device, 3, vocab_size), keys(device, 3)
    assert torch.equal(triton_sampling.sample(logits, *rows), sampling.sample(logits, *rows))


def test_sample_of_rows_apart_in_memory_with_excluded_tokens(device):
    logits, rows = logits_of(device, 4, 100)[::2, 10:59], keys(device, 2)
    logits[0, ::2] = -torch.inf
    logits[1] = -torch.inf
    logits[1, 7] = -40.0
    token_ids = triton_sampling.sample(logits, *rows)
    assert torch.equal(token_ids, sampling.sample(logits, *rows))
    assert token_ids[1] == 7


def test_parts_of_a_row_give_what_the_whole_gives(device, monkeypatch):
    logits, rows = logits_of(device, 2, 1000, steps=1), keys(device, 2)
    cut = truncation_of(device, [{"temperature": 0.0}, {"top_p": 0.9}])
    want = [triton_sampling.draw(logits, cut, *rows)]
    for tile, num_programs in ((256, 4), (512, 1000)):
        monkeypatch.setattr(triton_sampling, "DRAW_TILE", tile)
        monkeypatch.setattr(triton_sampling, "NUM_PROGRAMS", num_programs)
        want.append(triton_sampling.draw(logits, cut, *rows))
    assert all(torch.equal(each, want[0]) for each in want)


@pytest.mark.parametrize("params", PARAMS, ids=str)
@pytest.mark.parametrize(("vocab_size", "steps"), [(49, 4), pytest.param(300, None, marks=pytest.mark.long)])
def test_draws(device, params, steps, vocab_size):
    logits = logits_of(device, 1, vocab_size, steps=steps)
    cut, rows = truncation_of(device, [params]), keys(device, 1)
    kept = kept_by_kernel(logits, cut)
    exact = logits.double()
    assert not (kept & ~kept_by_torch(exact, slightly(cut, 1e-5))).any()
    assert not (~kept & kept_by_torch(exact, slightly(cut, -1e-5))).any()
    assert_same_tokens(triton_sampling.draw(logits, cut, *rows), logits, cut, rows)


@pytest.mark.parametrize("top_p", [0.05, 0.35, 0.55, 0.9])
def test_of_ties_on_the_border_of_top_p_the_lowest_ids_go(device, top_p):
    logits = torch.tensor([[1.0, 0.0, 1.0, -9.0, 1.0, 1.0, 0.0]], device=device)
    kept = kept_by_kernel(logits, truncation_of(device, [{"top_p": top_p}]))
    warped = warp(logits, [SamplingParams(max_tokens=1, top_p=top_p)])
    assert torch.equal(kept, warped.isfinite())


def test_ties_with_the_kth_stay(device):
    logits = torch.tensor([[1.0, 2.0, 1.0, 0.0, 1.0]], device=device)
    kept = kept_by_kernel(logits, truncation_of(device, [{"top_k": 2}]))
    assert kept.tolist() == [[True, True, True, False, True]]


@pytest.mark.parametrize("steps", [None, 8])
def test_the_reference_is_what_the_engine_warps(steps):
    """With plain torch alone, so that the kernel is held to the warpers through it."""
    logits = logits_of("cpu", len(PARAMS), 500, steps=steps)
    random = [row for row, params in enumerate(PARAMS) if params["temperature"]]
    warped = warp(logits[random], [SamplingParams(max_tokens=1, **PARAMS[row]) for row in random])
    ours = truncation.truncate(logits, truncation_of("cpu", PARAMS))[random]
    assert torch.equal(ours, warped)


@pytest.mark.parametrize(
    "values", [[0.0, -0.0, 0.0], [1e30, -1e30, 3.0, 1e-30], [5.0], [-3.0, -1e-40, 1e-40]]
)
@pytest.mark.parametrize("top_k", [1, 2])
def test_values_far_apart(device, values, top_k):
    logits = torch.tensor([values], device=device)
    cut = truncation_of(device, [{"top_k": top_k}])
    assert torch.equal(kept_by_kernel(logits, cut), kept_by_torch(logits, cut))


def test_fewer_finite_logits_than_top_k(device):
    logits = torch.tensor([[0.0, -torch.inf, 2.0, -torch.inf, 1.0]], device=device)
    kept = kept_by_kernel(logits, truncation_of(device, [{"top_k": 4}]))
    assert kept.tolist() == [[True, False, True, False, True]]


def test_rows_lie_at_64_bit_addresses(device, far_apart):
    rows, stride = keys(device, 3), 2**30 + 16
    logits = far_apart(2 * stride + 49, torch.float32).as_strided((3, 49), (stride, 1))
    logits.copy_(logits_of(device, 3, 49))
    assert torch.equal(triton_sampling.sample(logits, *rows), sampling.sample(logits, *rows))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite_give_some_token_and_harm_no_other(device, value):
    logits, rows = logits_of(device, 3, 49), keys(device, 3)
    cut = truncation_of(device, [{"top_p": 0.9}] * 3)
    want = triton_sampling.draw(logits, cut, *rows)
    logits[1] = torch.where(torch.arange(49, device=device) % 3 == 0, value, logits[1])
    with np.errstate(invalid="ignore"):
        token_ids = triton_sampling.draw(logits, cut, *rows)
    assert 0 <= token_ids[1] < 49
    assert torch.equal(token_ids[::2], want[::2])


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("vocab_size", [50_257, 151_936])
@pytest.mark.parametrize("steps", [None, 16])
def test_large_vocabularies(device, vocab_size, steps):
    logits, rows = logits_of(device, len(PARAMS), vocab_size, steps=steps), keys(device, len(PARAMS))
    cut = truncation_of(device, PARAMS)
    assert_same_tokens(triton_sampling.draw(logits, cut, *rows), logits, cut, rows)


@pytest.mark.long
@pytest.mark.timeout(300)
def test_draws_follow_the_truncated_distribution(device):
    num_draws = 20_000 if device.type == "cuda" else 250
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0, -2.0], device=device)
    params = {"temperature": 0.8, "top_k": 5, "top_p": 0.95}
    cut = truncation_of(device, [params] * num_draws)
    positions = torch.arange(num_draws, device=device)
    drawn = triton_sampling.draw(logits.expand(num_draws, -1), cut, positions * 0, positions, positions * 0)
    expected = warp(logits.unsqueeze(0), [SamplingParams(max_tokens=1, **params)])[0].softmax(0) * num_draws
    counts = drawn.bincount(minlength=6)
    assert not counts[expected == 0].any()
    found = expected > 0
    # 0.999 quantile of chi-squared with 4 degrees of freedom
    assert ((counts - expected)[found] ** 2 / expected[found]).sum() < 18.5
