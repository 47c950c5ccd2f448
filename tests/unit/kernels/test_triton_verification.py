"""Verification of drafts in Triton against plain torch; `-m gpu` runs the same tests compiled."""

import pytest
import torch

from kernels import triton_sampling, triton_verification, verification

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def padded(lens, width, high, device):
    ids = torch.full((len(lens), width), -1)
    for row, length in zip(ids, lens, strict=True):
        row[:length] = torch.randint(0, high, (length,))
    return ids.to(device)


@pytest.mark.parametrize("width", [0, 1, 3, 5])
def test_count_accepted(device, width):
    torch.manual_seed(width)
    draft_ids = padded([min(i % 7, width) for i in range(9)], width, 2, device)
    target_ids = torch.randint(0, 2, (9, width + 1), device=device)
    target_ids[8, :width] = draft_ids[8]
    counts = triton_verification.count_accepted(draft_ids, target_ids)
    assert torch.equal(counts, verification.count_accepted(draft_ids, target_ids))


LENS = [3, 0, 2, 1]


def batch(device, vocab_size, seed=0):
    """(target logits, draft logits, draft ids, seeds, positions, choices); the first tokens are likely."""
    torch.manual_seed(seed)
    target, draft = torch.randn(sum(LENS) + len(LENS), vocab_size), torch.randn(sum(LENS), vocab_size)
    target[:, :2] += 5
    draft[:, :2] += 5
    draft_ids = padded(LENS, 4, min(3, vocab_size), device)
    seeds = torch.randint(0, 2**62, (len(LENS),))
    requests = torch.arange(len(LENS))
    return (
        target.to(device),
        draft.to(device),
        draft_ids,
        *(each.to(device) for each in (seeds, 7 * requests, requests)),
    )


def assert_same_verdict(arguments):
    ours = triton_verification.rejection_verify(*arguments)
    plain = verification.rejection_verify(*arguments)
    assert torch.equal(ours[0], plain[0])
    assert torch.equal(ours[1], plain[1])
    return ours[0]


@pytest.mark.parametrize("vocab_size", [3, 1030])
@pytest.mark.parametrize("random_draft", [True, False])
def test_rejection(device, vocab_size, random_draft):
    target, draft, *others = batch(device, vocab_size)
    assert_same_verdict((target, draft if random_draft else None, *others))


def test_some_are_accepted_and_some_rejected(device):
    """What the other tests rely on."""
    counts = torch.stack([assert_same_verdict(batch(device, 49, seed)) for seed in range(2)])
    assert (counts > 0).any()
    assert (counts < torch.tensor(LENS, device=device)).any()


def test_a_draft_that_is_the_target_is_accepted_whole(device):
    target, _, draft_ids, *others = batch(device, 49)
    starts = torch.tensor(LENS).cumsum(0) + torch.arange(len(LENS))
    rows = torch.ones(len(target), dtype=torch.bool)
    rows[starts] = False
    counts = assert_same_verdict((target, target[rows.to(device)], draft_ids, *others))
    assert counts.tolist() == LENS


def test_of_a_draft_that_is_not_finite_nothing_is_kept(device):
    target, draft, draft_ids, *others = batch(device, 49)
    draft[:, 0] = torch.nan
    assert not assert_same_verdict((target, draft, draft_ids, *others)).any()


def test_excluded_tokens_are_not_drawn(device):
    target, draft, draft_ids, *others = batch(device, 49)
    target[:, 3:] = -torch.inf
    draft[:, 5:] = -torch.inf
    _, behind = triton_verification.rejection_verify(target, draft, draft_ids, *others)
    assert torch.equal(behind, verification.rejection_verify(target, draft, draft_ids, *others)[1])
    assert (behind < 3).all()


def test_parts_of_the_vocabulary(device, monkeypatch):
    arguments = batch(device, 300)
    for tile, num_programs in ((64, 12), (128, 1000)):
        monkeypatch.setattr(triton_sampling, "DRAW_TILE", tile)
        monkeypatch.setattr(triton_sampling, "NUM_PROGRAMS", num_programs)
        assert_same_verdict(arguments)


@pytest.mark.long
@pytest.mark.parametrize("random_draft", [True, False])
def test_a_large_vocabulary(device, random_draft):
    target, draft, *others = batch(device, 50_257)
    assert_same_verdict((target, draft if random_draft else None, *others))
