"""Which draft tokens the target keeps, for a whole ragged batch at once.

Coupled verification compares tokens: draft and target draw with the same noise, so a kept draft token is the
token that the target would have drawn (Gumbel coupling, Daliri et al. 2024, arXiv 2408.07978). Rejection
verification keeps a token with probability min(1, p / q) and redraws from the residual (Leviathan et al.
2022, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318): exact in distribution, for any draft.
"""

import torch
from torch import Tensor

from kernels.sampling import gumbel_noise, sample

DRAFT_STREAM = 1 << 32
"""Added to the choice index: the noise that a draft is drawn with when it must not be the target's."""
ACCEPT_STREAM = 1 << 33
"""Added to the choice index: the coins of rejection verification."""


def count_accepted(draft_ids: Tensor, target_ids: Tensor) -> Tensor:
    """Leading draft tokens that the target draws too, int64 [num_requests].

    draft_ids: int64 [num_requests, k], padded with -1; target_ids: int64 [num_requests, >= k].
    """
    return _leading(draft_ids == target_ids[:, : draft_ids.shape[1]])


def rejection_verify(
    target_logits: Tensor,
    draft_logits: Tensor | None,
    draft_ids: Tensor,
    seeds: Tensor,
    positions: Tensor,
    choices: Tensor,
) -> tuple[Tensor, Tensor]:
    """(number of accepted draft tokens, the token behind them), int64 [num_requests] each.

    target_logits: fp32 [num_rows, vocab_size], for each request one row per draft token and one behind them;
    draft_logits: fp32 [num_draft_tokens, vocab_size], what each draft token was drawn from with the noise of
    DRAFT_STREAM, None if drafts are not random; both as they are drawn from, -inf where excluded;
    draft_ids: int64 [num_requests, k], padded with -1; seeds, positions, choices: int64 [num_requests], the
    positions of each request's first row.
    The token behind is recovered from the residual max(p - q, 0) at the first rejection, else a bonus.
    """
    proposed = draft_ids >= 0
    request, offset = proposed.nonzero(as_tuple=True)
    first_rows = _starts(proposed.sum(1) + 1)
    target = target_logits.index_select(0, first_rows[request] + offset).softmax(-1)
    tokens = draft_ids[proposed].unsqueeze(1)
    draft = _draft_probs(draft_logits, tokens, target)
    coins = _coins(seeds[request], positions[request] + offset, choices[request])
    kept = coins * draft.gather(1, tokens).squeeze(1) < target.gather(1, tokens).squeeze(1)
    num_accepted = _leading(torch.zeros_like(proposed).masked_scatter_(proposed, kept))
    probs = target_logits.index_select(0, first_rows + num_accepted).softmax(-1)
    rejected = (num_accepted < proposed.sum(1)).nonzero().squeeze(1)
    first_drafts = _starts(proposed.sum(1)) + num_accepted
    probs[rejected] = _residual(probs[rejected], draft[first_drafts[rejected]])
    return num_accepted, sample(probs.log(), seeds, positions + num_accepted, choices)


def _leading(kept: Tensor) -> Tensor:
    """Number of leading True of each row."""
    return kept.cumprod(1).sum(1)


def _starts(lengths: Tensor) -> Tensor:
    return lengths.cumsum(0) - lengths


def _draft_probs(draft_logits: Tensor | None, tokens: Tensor, like: Tensor) -> Tensor:
    """[num_draft_tokens, vocab_size]; of a draft with logits that are not finite nothing is kept."""
    if draft_logits is None:
        return torch.zeros_like(like).scatter_(1, tokens, 1.0)
    return draft_logits.softmax(-1).nan_to_num_(nan=torch.inf)


def _residual(target: Tensor, draft: Tensor) -> Tensor:
    """Not normalised; the target's own where rounding leaves nothing of it."""
    residual = (target - draft).clamp_(min=0)
    return torch.where(residual.sum(-1, keepdim=True) > 0, residual, target)


def _coins(seeds: Tensor, positions: Tensor, choices: Tensor) -> Tensor:
    """Uniform in (0, 1), fp32 [num_rows]: the distribution function of the noise at the noise."""
    noise = gumbel_noise(seeds, positions, choices + ACCEPT_STREAM, 1).squeeze(1)
    return (-(-noise).exp()).exp()
