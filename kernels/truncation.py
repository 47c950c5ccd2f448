"""Temperature, top-k, top-p and min-p of whole batches as one operator with the draw: the torch reference.

It means what transformers' warpers mean, in their order, with every parameter in a tensor: nothing about a
step but its number of rows has to be known on the host.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.sampling import argmax, gumbel_noise


class Truncation(NamedTuple):
    """What each row is drawn from; all [num_rows]."""

    temperatures: Tensor
    """fp32; 0: greedy, the other parameters and the noise are not used."""
    top_ks: Tensor
    """int32; 0: all tokens."""
    top_ps: Tensor
    """fp32; 1: all tokens."""
    min_ps: Tensor
    """fp32; 0: all tokens."""


def draw(logits: Tensor, truncation: Truncation, seeds: Tensor, positions: Tensor, choices: Tensor) -> Tensor:
    """Token ids, int64 [num_rows]: the likeliest of greedy rows, else a draw from what truncation leaves.

    logits: fp32 [num_rows, vocab_size], -inf where excluded; seeds, positions, choices: int64 [num_rows]. A
    tie goes to the lowest id. Rows with NaN or without a finite logit give some token id.
    """
    greedy = truncation.temperatures == 0
    noise = gumbel_noise(seeds, positions, choices, logits.shape[1])
    drawn = argmax(truncate(logits, truncation) + noise)
    return torch.where(greedy, argmax(logits), drawn)


def truncate(logits: Tensor, truncation: Truncation) -> Tensor:
    """Logits over temperature (1 where that is 0), -inf where excluded.

    Ties with the k-th likeliest token stay; of ties on the border of top-p the lowest ids go.
    """
    temperatures, top_ks, top_ps, min_ps = (values.unsqueeze(1) for values in truncation)
    scores = logits / torch.where(temperatures == 0, 1.0, temperatures)
    ordered, ids = scores.sort(dim=-1, stable=True)
    top_ks = torch.where(top_ks == 0, logits.shape[1], top_ks).clamp(max=logits.shape[1]).long()
    kept = ordered >= ordered.gather(1, logits.shape[1] - top_ks)
    mass = ordered.masked_fill(~kept, -torch.inf).softmax(-1).cumsum(-1)
    inside = (mass > 1 - top_ps) | (top_ps == 1)
    inside[:, -1] = True
    ratios = (ordered - ordered[:, -1:]).exp()
    kept &= inside & (ratios >= min_ps)
    return scores.masked_fill(~kept.scatter(1, ids, kept), -torch.inf)
