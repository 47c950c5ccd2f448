"""Temperature and truncation of the distribution that is drawn from, as transformers' warpers have them.

Each is one vectorised pass over the rows whose value is not neutral.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.request import SamplingParams


def warp(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Temperature, top-k, top-p, min-p and typical-p, in this order, of rows that are not greedy.

    Returns a new tensor, -inf where excluded.
    """
    logits = logits / _column([each.temperature for each in params], logits)
    _exclude(logits, [max(each.top_k, 0) for each in params], 0, _below_top_k)
    _exclude(logits, [each.top_p for each in params], 1, _outside_top_p)
    _exclude(logits, [each.min_p for each in params], 0, _below_min_p)
    _exclude(logits, [each.typical_p for each in params], 1, _outside_typical_p)
    return logits


def _exclude(
    logits: Tensor, values: list[float], neutral: float, excluded: Callable[[Tensor, list[float]], Tensor]
) -> None:
    """Apply one warper, in place, to the rows whose value is not neutral."""
    rows = [row for row, value in enumerate(values) if value != neutral]
    if rows:
        index = _index(rows, logits)
        scores = logits.index_select(0, index)
        logits[index] = scores.masked_fill(excluded(scores, [values[row] for row in rows]), -torch.inf)


def _below_top_k(scores: Tensor, top_k: list[float]) -> Tensor:
    """Less likely than the k-th; ties with it stay."""
    ks = [min(int(k), scores.shape[1]) for k in top_k]
    best = scores.topk(max(ks), dim=-1).values
    kth = best.gather(1, _index([k - 1 for k in ks], scores).unsqueeze(1))
    return scores < kth


def _outside_top_p(scores: Tensor, top_p: list[float]) -> Tensor:
    """Not of the smallest set of likeliest tokens with probability top_p (Holtzman et al. 2019)."""
    ordered, index = scores.sort(dim=-1, stable=True)
    removed = ordered.softmax(-1).cumsum(-1) <= 1 - _column(top_p, scores)
    removed[:, -1] = False
    return removed.scatter(1, index, removed)


def _below_min_p(scores: Tensor, min_p: list[float]) -> Tensor:
    """Less probable than min_p times the likeliest token (Nguyen et al. 2024)."""
    probs = scores.softmax(-1)
    return probs < _column(min_p, scores) * probs.amax(-1, keepdim=True)


def _outside_typical_p(scores: Tensor, typical_p: list[float]) -> Tensor:
    """Not of the smallest set of tokens with probability typical_p whose surprise is nearest to the entropy.

    Locally typical sampling (Meister et al. 2022).
    """
    logprobs = scores.log_softmax(-1)
    entropy = -(logprobs * logprobs.exp()).nansum(-1, keepdim=True)
    distance = (-logprobs - entropy).abs()
    ordered, index = distance.sort(dim=-1)
    mass = scores.gather(1, index).softmax(-1).cumsum(-1)
    last = (mass < _column(typical_p, scores)).sum(-1, keepdim=True).clamp_(max=scores.shape[1] - 1)
    return distance > ordered.gather(1, last)


def _index(values: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=like.device)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device).unsqueeze(1)
