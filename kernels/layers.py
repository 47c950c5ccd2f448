"""Reference operators of a transformer block outside attention."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square normalisation (Zhang and Sennrich 2019) in fp32.

    x: [num_tokens, hidden], weight: [hidden]; the result has x's shape and dtype.
    """
    x_f32 = x.float()
    variance = x_f32.pow(2).mean(-1, keepdim=True)
    return weight * (x_f32 * torch.rsqrt(variance + eps)).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """rms_norm(x + residual); the sum is left in `residual`.

    x, residual: [num_tokens, hidden].
    """
    residual += x
    return rms_norm(residual, weight, eps)


def rope(heads: Tensor, positions: Tensor, cos_table: Tensor, sin_table: Tensor) -> None:
    """Rotary position embedding (Su et al. 2021) in place, halves rotated against each other as Llama does.

    heads: [num_tokens, num_heads, head_dim], q and k heads alike, positions: int64 [num_tokens], tables:
    fp32 [max_model_len, head_dim / 2].
    """
    cos = cos_table.index_select(0, positions).unsqueeze(1)
    sin = sin_table.index_select(0, positions).unsqueeze(1)
    first, second = heads.float().chunk(2, dim=-1)
    heads.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1))


def silu_mul(gate_up: Tensor) -> Tensor:
    """SwiGLU's activation (Shazeer 2020): silu(first half) * second half of the last dimension."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
