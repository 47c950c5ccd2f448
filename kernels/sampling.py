"""Counter-based noise and the choice of a token: argmax(logits + Gumbel noise); bit masks of tokens.

The Gumbel-max trick draws from softmax(logits). Because the noise is a pure function of
(seed, position, choice, token id), a request draws the same tokens in any batch, on any worker.
"""

import numpy as np
import torch
from torch import Tensor

from kernels.checksums import as_int64, splitmix64

POSITION_STRIDE = as_int64(0xD1342543DE82EF95)
CHOICE_STRIDE = as_int64(0xAF251AF3B0F025B5)
LARGEST_UNIFORM = 1.0 - 2.0**-24
"""The largest fp32 below 1: keeps every Gumbel value finite."""


def gumbel_noise(seeds: Tensor, positions: Tensor, choices: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise, fp32 [num_rows, vocab_size].

    seeds, positions, choices: int64 [num_rows]. The uniform under it keeps fp32's relative precision
    near 0, which is the upper tail of the noise.
    """
    keys = splitmix64(splitmix64(splitmix64(seeds) + positions * POSITION_STRIDE) + choices * CHOICE_STRIDE)
    token_ids = torch.arange(vocab_size, dtype=torch.int64, device=seeds.device)
    bits = splitmix64(keys.unsqueeze(1) ^ splitmix64(token_ids)) & (2**63 - 1)
    uniform = ((bits.float() + 0.5) * 2.0**-63).clamp_(max=LARGEST_UNIFORM)
    return -(-torch.log1p(-uniform)).log()


def finite_best(scores: Tensor) -> Tensor:
    """1 for each row whose largest value is a finite number, else 0; int64 [num_rows].

    scores: fp32 [num_rows, vocab_size].
    """
    if scores.is_cpu:
        return torch.from_numpy(np.isfinite(scores.numpy().max(-1)).astype(np.int64))
    return scores.amax(-1).isfinite().long()


def argmax(scores: Tensor) -> Tensor:
    """Where each row is largest, int64 [num_rows]; a tie goes to the lowest id.

    scores: fp32 [num_rows, vocab_size]. On a CPU numpy takes a tenth of torch's time.
    """
    return torch.from_numpy(scores.numpy().argmax(-1)) if scores.is_cpu else scores.argmax(-1)


def sample(logits: Tensor, seeds: Tensor, positions: Tensor, choices: Tensor) -> Tensor:
    """Draw token ids, int64 [num_rows], from softmax(logits); a tie goes to the lowest id.

    logits: fp32 [num_rows, vocab_size], already divided by the temperature, -inf where excluded;
    seeds, positions, choices: int64 [num_rows].
    """
    return argmax(logits + gumbel_noise(seeds, positions, choices, logits.shape[-1]))


def apply_bit_mask(logits: Tensor, rows: Tensor, masks: Tensor) -> None:
    """Set logits to -inf, in place, where a row's mask has no bit; rows that are not named stay.

    logits: [num_rows, vocab_size]; rows: int64 [k], distinct; masks: int32 [k, ceil(vocab_size / 32)],
    the lowest token in the lowest bit.
    """
    shifts = torch.arange(32, dtype=torch.int32, device=masks.device)
    bits = (masks.unsqueeze(-1) >> shifts).bitwise_and_(1).flatten(1)
    excluded = bits[:, : logits.shape[-1]] == 0
    logits.index_copy_(0, rows, logits.index_select(0, rows).masked_fill_(excluded, -torch.inf))
