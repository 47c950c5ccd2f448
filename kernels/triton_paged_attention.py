"""Paged attention on a GPU: which kernel computes which requests of a batch."""

import torch
from torch import Tensor

from kernels.attention import AttentionBatch
from kernels.paged_batch import AttentionKind
from kernels.triton_decode_attention import MAX_QUERY_LEN, decode_attention
from kernels.triton_prefill_attention import prefill_attention


def paged_attention(q: Tensor, kv_layer: Tensor, batch: AttentionBatch, scale: float) -> Tensor:
    """See kernels.attention; the pool may also be float8_e4m3fn."""
    if not batch.query_lens:
        return torch.zeros_like(q)
    kind, longest = AttentionKind(scale=scale), max(batch.query_lens)
    if longest <= MAX_QUERY_LEN:
        return decode_attention(q, kv_layer, batch.paged, kind)
    if min(batch.query_lens) > 1:
        return prefill_attention(q, kv_layer, batch.paged, kind)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    decode_attention(q, kv_layer, batch.paged, kind, max_query_len=1, out=out)
    return prefill_attention(q, kv_layer, batch.paged, kind, longer_than=1, out=out)
