"""The law of verification: chi-squared tests of a Markov chain as target and another one as draft.

`python tests/unit/engine/test_verification.py` prints the table.
"""

import itertools

import pytest
import torch

from engine.request import SamplingParams
from engine.warpers import warp
from kernels import ops
from kernels.verification import DRAFT_STREAM

NUM_SAMPLES = 100_000
VOCAB = 5
CHAIN_LEN = 3
LAWS = {
    "temperature 1": {},
    "temperature 0.6": {"temperature": 0.6},
    "temperature 1.5": {"temperature": 1.5},
    "top_p 0.8": {"top_p": 0.8},
    "top_k 3": {"top_k": 3},
    "all": {"temperature": 0.8, "top_p": 0.9, "top_k": 4},
}


def chains(law):
    """Logits [VOCAB, VOCAB] of the next token given the last one, of target and draft, as drawn from."""
    generator = torch.Generator().manual_seed(5)
    target = torch.randn(VOCAB, VOCAB, generator=generator) * 1.2
    draft = target + torch.randn(VOCAB, VOCAB, generator=generator) * 0.7
    params = [SamplingParams(max_tokens=1, **law)] * VOCAB
    return warp(target, params), warp(draft, params)


def draw(logits, last, position, stream=0):
    """The next token of every sample; seeds are the samples' numbers."""
    seeds = torch.arange(NUM_SAMPLES)
    positions, choices = torch.full_like(seeds, position), torch.full_like(seeds, stream)
    return ops.sample(logits[last], seeds, positions, choices)


def drafts(logits, num_drafts, stream):
    """[NUM_SAMPLES, num_drafts] draft tokens and the last tokens that each row of the target sees."""
    last = torch.zeros(NUM_SAMPLES, dtype=torch.int64)
    found = [last]
    for position in range(num_drafts):
        found.append(draw(logits, found[-1], position, stream))
    return torch.stack(found[1:], 1), torch.stack(found, 1)


def coupled(target, draft, num_drafts):
    """Emitted tokens [NUM_SAMPLES, num_drafts + 1] and how many of them count."""
    draft_ids, seen = drafts(draft, num_drafts, stream=0)
    rows = torch.stack([draw(target, seen[:, i], i) for i in range(num_drafts + 1)], 1)
    return rows, ops.count_accepted(draft_ids, rows) + 1


def rejection(target, draft, num_drafts, *, point_mass=False):
    draft_ids, seen = drafts(draft, num_drafts, stream=DRAFT_STREAM)
    seeds = torch.arange(NUM_SAMPLES)
    if point_mass:
        likeliest = int(target[0].argmax())
        draft_ids, seen = torch.full_like(draft_ids, likeliest), seen.clone()
        seen[:, 1:] = likeliest
    num_accepted, behind = ops.rejection_verify(
        target[seen.flatten()],
        None if point_mass else draft[seen[:, :-1].flatten()],
        draft_ids,
        seeds,
        torch.zeros_like(seeds),
        torch.zeros_like(seeds),
    )
    emitted = torch.cat((draft_ids, torch.zeros(NUM_SAMPLES, 1, dtype=torch.int64)), 1)
    return emitted.scatter(1, num_accepted.unsqueeze(1), behind.unsqueeze(1)), num_accepted + 1


def p_value(target, emitted, num_emitted):
    """Of the emitted chains, each continued by the target up to CHAIN_LEN tokens."""
    last = torch.zeros(NUM_SAMPLES, dtype=torch.int64)
    cell = torch.zeros_like(last)
    for position in range(CHAIN_LEN):
        own = draw(target, last, position)
        last = (
            own if position >= emitted.shape[1] else own.where(num_emitted <= position, emitted[:, position])
        )
        cell = cell * VOCAB + last
    probs = target.softmax(-1)
    law = torch.stack(
        [
            torch.stack([probs[a, b] for a, b in itertools.pairwise((0, *chain))]).prod()
            for chain in itertools.product(range(VOCAB), repeat=CHAIN_LEN)
        ]
    ).double()
    counts, expected = torch.bincount(cell, minlength=len(law)), law * NUM_SAMPLES
    assert not counts[law == 0].any()
    # Cells that are hardly ever seen are one cell, as Pearson's test wants.
    rare = expected < 10
    seen = torch.cat((counts[~rare], counts[rare].sum().view(1)))
    wanted = torch.cat((expected[~rare], expected[rare].sum().view(1)))
    keep = wanted > 0
    statistic = ((seen - wanted)[keep] ** 2 / wanted[keep]).sum()
    degrees = torch.tensor(float(keep.sum() - 1))
    return float(torch.special.gammaincc(degrees / 2, (statistic / 2).float()))


def point_mass(target, draft, num_drafts):
    return rejection(target, draft, num_drafts, point_mass=True)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("verify", [coupled, rejection, point_mass])
def test_emitted_tokens_follow_the_target(verify, law):
    target, draft = chains(LAWS[law])
    emitted, num_emitted = verify(target, draft, 2)
    assert p_value(target, emitted, num_emitted) > 1e-4
    assert 0 < (num_emitted - 1).float().mean() < 2


@pytest.mark.parametrize("num_drafts", [1, 3])
def test_any_number_of_drafts_follows_the_target(num_drafts):
    target, draft = chains({})
    assert p_value(target, *rejection(target, draft, num_drafts)) > 1e-4


def test_a_wrong_law_is_found():
    target, draft = chains({})
    rows, num_emitted = coupled(target, draft, 2)
    assert p_value(draft, rows, num_emitted) < 1e-4


def test_a_coupled_token_is_the_one_that_is_drawn_without_a_draft():
    target, draft = chains({"temperature": 0.6})
    emitted, num_emitted = coupled(target, draft, 2)
    last = torch.zeros(NUM_SAMPLES, dtype=torch.int64)
    for position in range(3):
        last = draw(target, last, position)
        counts = num_emitted > position
        assert torch.equal(emitted[counts, position], last[counts])


def test_a_ragged_batch_is_its_requests_one_by_one():
    generator = torch.Generator().manual_seed(1)
    lens = [2, 0, 3, 1]
    draft_ids = torch.full((4, 3), -1)
    for row, num in enumerate(lens):
        draft_ids[row, :num] = torch.randint(0, VOCAB, (num,), generator=generator)
    target = torch.randn(sum(lens) + 4, VOCAB, generator=generator)
    draft = torch.randn(sum(lens), VOCAB, generator=generator)
    keys = [torch.randint(0, 99, (4,), generator=generator) for _ in range(3)]
    together = ops.rejection_verify(target, draft, draft_ids, *keys)
    rows, drafts_before = 0, 0
    for row, num in enumerate(lens):
        alone = ops.rejection_verify(
            target[rows : rows + num + 1],
            draft[drafts_before : drafts_before + num],
            draft_ids[row : row + 1],
            *(key[row : row + 1] for key in keys),
        )
        assert [int(each) for each in alone] == [int(each[row]) for each in together]
        rows, drafts_before = rows + num + 1, drafts_before + num


def test_a_greedy_target_keeps_only_its_own_token():
    target = torch.full((3, VOCAB), -torch.inf)
    target[torch.arange(3), torch.tensor([2, 4, 1])] = 0.0
    zero = torch.zeros(1, dtype=torch.int64)
    for draft_ids, expected in (([2, 4], (2, 1)), ([2, 3], (1, 4)), ([0, 4], (0, 2))):
        found = ops.rejection_verify(target, None, torch.tensor([draft_ids]), zero, zero, zero)
        assert tuple(map(int, found)) == expected


def test_a_draft_that_is_not_finite_is_never_kept():
    target = torch.zeros(2, VOCAB)
    zero = torch.zeros(1, dtype=torch.int64)
    draft = torch.full((1, VOCAB), torch.nan)
    num_accepted, behind = ops.rejection_verify(target, draft, torch.tensor([[3]]), zero, zero, zero)
    assert int(num_accepted) == 0
    assert 0 <= int(behind) < VOCAB


def main() -> None:
    print(f"{'law':18}{'verification':14}{'p':>8}{'accepted of 2':>16}   ({NUM_SAMPLES} samples each)")
    for law, verify in itertools.product(LAWS, (coupled, rejection, point_mass)):
        target, draft = chains(LAWS[law])
        emitted, num_emitted = verify(target, draft, 2)
        accepted = float((num_emitted - 1).float().mean())
        print(f"{law:18}{verify.__name__:14}{p_value(target, emitted, num_emitted):8.4f}{accepted:16.3f}")


if __name__ == "__main__":
    main()
