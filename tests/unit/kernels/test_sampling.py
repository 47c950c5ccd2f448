import math

import pytest
import torch

from kernels import ops


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def test_noise_is_a_function_of_seed_position_and_choice_alone():
    noise = ops.gumbel_noise(ints(5, -3, 5), ints(7, 7, 7), ints(0, 0, 0), 50)
    assert torch.equal(noise[0], noise[2])
    assert torch.equal(ops.gumbel_noise(ints(-3), ints(7), ints(0), 50)[0], noise[1])
    assert torch.equal(ops.gumbel_noise(ints(5), ints(7), ints(0), 9)[0], noise[0, :9])
    for other in ((6, 7, 0), (5, 8, 0), (5, 7, 1), (7, 5, 0)):
        assert not torch.isclose(ops.gumbel_noise(*map(ints, other), 50)[0], noise[0]).any()


def test_noise_has_the_moments_of_a_gumbel_distribution():
    num_rows = 200
    zeros = torch.zeros(num_rows, dtype=torch.int64)
    noise = ops.gumbel_noise(zeros, torch.arange(num_rows), zeros, 1000)
    assert noise.isfinite().all()
    assert abs(noise.mean() - 0.57722) < 0.01
    assert abs(noise.std() - math.pi / math.sqrt(6)) < 0.01
    for x in (-1.0, 0.0, 2.0, 5.0):
        assert abs((noise < x).float().mean() - math.exp(-math.exp(-x))) < 0.005


def chi_squared(counts: torch.Tensor, probs: torch.Tensor) -> float:
    expected = probs * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def test_draws_follow_softmax_along_positions_seeds_and_choices():
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0, -2.0])
    num_draws = 20_000
    counter, fixed = torch.arange(num_draws), torch.full((num_draws,), 11)
    for seeds, positions, choices in (
        (counter, fixed, fixed),
        (fixed, counter, fixed),
        (fixed, fixed, counter),
    ):
        drawn = ops.sample(logits.expand(num_draws, -1), seeds, positions, choices)
        # 0.999 quantile of chi-squared with 5 degrees of freedom
        assert chi_squared(drawn.bincount(minlength=6), logits.softmax(0)) < 20.5


def test_successive_draws_are_independent():
    num_draws = 20_000
    positions = torch.arange(num_draws)
    drawn = ops.sample(torch.zeros(num_draws, 4), torch.full_like(positions, 3), positions, 0 * positions)
    pairs = drawn[:-1] * 4 + drawn[1:]
    # 0.999 quantile of chi-squared with 15 degrees of freedom
    assert chi_squared(pairs.bincount(minlength=16), torch.full((16,), 1 / 16)) < 37.7


@pytest.mark.parametrize("vocab_size", [1, 7, 61, 9216])
def test_the_largest_is_found_and_of_equals_the_first(vocab_size):
    generator = torch.Generator().manual_seed(vocab_size)
    scores = torch.randint(-9, 9, (64, vocab_size), generator=generator).float()
    scores[0], scores[1, -1] = -torch.inf, torch.inf
    places = torch.arange(vocab_size).expand_as(scores)
    is_best = scores == scores.amax(-1, keepdim=True)
    expected = places.masked_fill(~is_best, vocab_size).amin(-1)
    assert torch.equal(ops.argmax(scores), expected)
    assert torch.equal(ops.argmax(scores.expand(2, -1, -1)[1]), expected)


def test_a_row_without_a_finite_best_is_found():
    rows = torch.zeros(6, 9)
    rows[1, 3], rows[2, 8], rows[4, 0] = torch.nan, torch.inf, -torch.inf
    rows[3] = -torch.inf
    assert ops.finite_best(rows).tolist() == [1, 0, 0, 0, 1, 1]


def test_excluded_tokens_are_never_drawn():
    logits = torch.full((500, 8), -torch.inf)
    logits[:, 3] = -30.0
    positions = torch.arange(500)
    assert (ops.sample(logits, positions, positions, positions) == 3).all()
