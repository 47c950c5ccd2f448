"""Pools, batches and bounds for the tests of the paged attention kernels."""

import itertools

import torch
from torch import Tensor

from kernels.paged_batch import AttentionKind, PagedBatch, paged_attention

NUM_BLOCKS = 64


def scenario(
    context_lens,
    query_lens=None,
    *,
    heads=(2, 1, 64),
    block_size=16,
    dtype=torch.float16,
    pool=None,
    spare_rows=0,
    device="cpu",
):
    """(q, kv_layer, batch): every slot that no context reaches holds NaN, and so do unused table entries."""
    num_q_heads, num_kv_heads, head_dim = heads
    query_lens = query_lens or [1] * len(context_lens)
    torch.manual_seed(len(context_lens))
    kv_layer = torch.full((2, NUM_BLOCKS, block_size, num_kv_heads, head_dim), torch.nan)
    poison, *free = torch.randperm(NUM_BLOCKS).tolist()
    tables = torch.full((len(context_lens), max(context_lens) // block_size + 2), poison, dtype=torch.int32)
    for seq, context_len in enumerate(context_lens):
        for place, start in enumerate(range(0, context_len, block_size)):
            tables[seq, place] = free.pop()
            filled = min(block_size, context_len - start)
            content = torch.randn(2, filled, num_kv_heads, head_dim)
            kv_layer[:, tables[seq, place], :filled] = content
    batch = PagedBatch(
        cu_query_lens=int32([0, *itertools.accumulate(query_lens)], device),
        context_lens=int32(context_lens, device),
        block_tables=tables.to(device),
        max_query_len=max(query_lens),
        max_context_len=max(context_lens),
    )
    # Queries as they lie in a packed projection of q, k and v.
    qkv = torch.randn(sum(query_lens) + spare_rows, num_q_heads + 2 * num_kv_heads, head_dim)
    q = qkv.to(device, dtype)[:, :num_q_heads]
    return q, kv_layer.to(pool or dtype).to(device), batch


def int32(values, device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def poisoned(q: Tensor) -> Tensor:
    return torch.full(q.shape, torch.nan, dtype=q.dtype, device=q.device)


def assert_as_exact_as_torch(
    out: Tensor, q: Tensor, kv_layer: Tensor, batch: PagedBatch, kind: AttentionKind
):
    """At most twice the error of the plain reference in the same dtype, both against float64."""
    exact = paged_attention(q.double(), kv_layer, batch, kind)
    plain = paged_attention(q, kv_layer, batch, kind)
    error, plain_error = ((result - exact).abs().max().item() for result in (out, plain))
    rounding = torch.finfo(q.dtype).eps * exact.abs().max().item()
    assert error <= 2 * plain_error + rounding, (error, plain_error)
    owned = batch.cu_query_lens[-1]
    assert not out[owned:].any()
