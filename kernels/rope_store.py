"""Rotary embedding of a batch's queries and keys and the write of its keys and values, as one operator."""

from typing import NamedTuple

from torch import Tensor

from kernels import layers, native


class HeadNorms(NamedTuple):
    """RMS norms of each query and key head before its rotation, as Qwen3 has them."""

    q_weight: Tensor
    """[head_dim]"""
    k_weight: Tensor
    """[head_dim]"""
    eps: float


def rope_store_kv(
    heads: Tensor,
    positions: Tensor,
    cos_table: Tensor,
    sin_table: Tensor,
    kv_layer: Tensor,
    slot_mapping: Tensor,
    norms: HeadNorms | None = None,
) -> None:
    """Norm (if any) and rotate the q heads in place; write rotated keys, and values, to their slots.

    heads: [num_rows, num_q_heads + 2 * num_kv_heads, head_dim], q, k and v heads in this order, of which the
    k heads are scratch afterwards; positions and tables as in `layers.rope`; kv_layer and slot_mapping as in
    `paged_kv.store_kv`.
    """
    num_kv_heads = kv_layer.shape[3]
    q, k, v = heads.tensor_split((-2 * num_kv_heads, -num_kv_heads), dim=1)
    if norms is not None:
        q.copy_(layers.rms_norm(q, norms.q_weight, norms.eps))
        k.copy_(layers.rms_norm(k, norms.k_weight, norms.eps))
    native.rope(heads[:, :-num_kv_heads], positions, cos_table, sin_table)
    native.store_kv(k, v, kv_layer, slot_mapping)
