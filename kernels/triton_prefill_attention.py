"""Paged attention of many queries per request over their past and themselves, on a GPU: (chunked) prefill.

As in FlashAttention-2 (Dao 2023, arXiv 2307.08691) a program owns a tile of queries and passes over the keys
that they see; tiles with the most keys start first. The bits of a request's result depend on its own queries,
its context and `PrefillTiling`, and on where its queries start in the batch only as far as tiles are cut.
"""

from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.paged_batch import AttentionKind, PagedBatch
from kernels.triton_attention import (
    attend,
    check_operands,
    compute_capability,
    operand_dtype,
    padded_head_dim,
    stored_sides,
)
from kernels.triton_launch import Launch

MAX_ROWS: Final = 128
"""Query heads of a tile, and so most heads of a group."""


@dataclass(frozen=True, kw_only=True)
class PrefillTiling:
    """How queries and contexts are cut."""

    rows: int
    """Query heads of one tile, a power of two of at least 16 and of at least the heads of a group."""
    tile: int
    """Keys of one step, a power of two of at least 16."""
    num_warps: int = 8
    num_stages: int = 3


@triton.jit
def _find_tile(
    cu_query_lens_ptr: tl.tensor, num_seqs: tl.tensor, tile: tl.tensor, QUERIES: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """(request, first query in it) of a tile.

    The tiles of request i start at cu_query_lens[i] // QUERIES + i: in packed order, sometimes with one tile
    too many. Request num_seqs stands for the rows of no request.
    """
    seq, above = tile * 0, num_seqs + 1
    while above - seq > 1:
        middle = (seq + above) // 2
        if tl.load(cu_query_lens_ptr + middle) // QUERIES + middle <= tile:
            seq = middle
        else:
            above = middle
    return seq, (tile - tl.load(cu_query_lens_ptr + seq) // QUERIES - seq) * QUERIES


@triton.jit(do_not_specialize=["num_seqs", "num_rows", "table_stride"])
def prefill_kernel(
    q_ptr: tl.tensor, keys_ptr: tl.tensor, values_ptr: tl.tensor, out_ptr: tl.tensor,
    cu_query_lens_ptr: tl.tensor, context_lens_ptr: tl.tensor, block_tables_ptr: tl.tensor,
    num_seqs: tl.tensor, num_rows: tl.tensor, q_stride: tl.tensor, out_stride: tl.tensor,
    block_stride: tl.tensor, token_stride: tl.tensor, table_stride: tl.tensor,
    score_scale: tl.tensor, v_scale: tl.tensor,
    GROUP: tl.constexpr, ROWS: tl.constexpr, LONGER_THAN: tl.constexpr,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
    WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """One KV head of ROWS // GROUP queries: grid (num_kv_heads, tiles).

    Tile row r is query r // GROUP, head r % GROUP of the group.
    """
    QUERIES: tl.constexpr = ROWS // GROUP
    kv_head, tile = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    seq, first = _find_tile(cu_query_lens_ptr, num_seqs, tile, QUERIES)
    first_row = tl.load(cu_query_lens_ptr + seq)
    query_len = tl.load(cu_query_lens_ptr + seq + 1, mask=seq < num_seqs, other=num_rows) - first_row
    context_len = tl.load(context_lens_ptr + seq, mask=seq < num_seqs, other=0)
    if first >= query_len or query_len <= LONGER_THAN or (LONGER_THAN > 0 and seq == num_seqs):
        return
    query = first + tl.arange(0, ROWS) // GROUP
    head = kv_head * GROUP + tl.arange(0, ROWS) % GROUP
    row = (first_row + query).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    is_row = (query < first + QUERIES) & (query < query_len)
    mask = is_row[:, None] & (columns[None, :] < HEAD_DIM)
    q_rows = q_ptr + row * q_stride + head * HEAD_DIM
    queries = tl.load(q_rows[:, None] + columns[None, :], mask=mask, other=0).to(DTYPE)
    first_position = context_len - query_len + first
    end = tl.minimum(first_position + QUERIES, context_len)
    oldest = tile * 0
    if WINDOW > 0:
        oldest = tl.maximum(first_position + 1 - WINDOW, 0)
    begin = oldest // TILE * TILE
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    weight = tl.zeros((ROWS,), dtype=tl.float32)
    peak = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    positions = context_len - query_len + query
    table_ptr = block_tables_ptr + seq.to(tl.int64) * table_stride
    if WINDOW == 0:
        # Every query sees every key up to the first query.
        masked_from = tl.maximum(first_position + 1, 0) // TILE * TILE
        total, weight, peak = attend(
            queries, positions, total, weight, peak,
            keys_ptr + kv_head * HEAD_DIM, values_ptr + kv_head * HEAD_DIM, table_ptr,
            block_stride, token_stride, begin, masked_from, oldest, context_len, score_scale,
            BLOCK_SIZE, HEAD_DIM, TILE, WINDOW, SOFT_CAP, PRECISION, False,
        )  # fmt: skip
        begin = masked_from
    total, weight, peak = attend(
        queries, positions, total, weight, peak,
        keys_ptr + kv_head * HEAD_DIM, values_ptr + kv_head * HEAD_DIM, table_ptr,
        block_stride, token_stride, begin, end, oldest, context_len, score_scale,
        BLOCK_SIZE, HEAD_DIM, TILE, WINDOW, SOFT_CAP, PRECISION, True,
    )  # fmt: skip
    result = total / tl.where(weight == 0, 1.0, weight)[:, None] * v_scale
    out_rows = out_ptr + row * out_stride + head * HEAD_DIM
    tl.store(out_rows[:, None] + columns[None, :], result.to(out_ptr.dtype.element_ty), mask=mask)


def prefill_attention(
    q: Tensor,
    kv_layer: Tensor,
    batch: PagedBatch,
    kind: AttentionKind,
    *,
    tiling: PrefillTiling | None = None,
    longer_than: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """`paged_batch.paged_attention` for requests of any number of queries, one included.

    q: [num_rows, num_q_heads, head_dim], rows any distance apart; kv_layer: [2, num_blocks, block_size,
    num_kv_heads, head_dim], of q's type, float8_e4m3fn, or uint8 with the bits of that.
    longer_than: if positive, only requests with more queries are computed; no other row of `out` is written.
    """
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tiling = tiling or default_tiling(q, kv_layer, batch)
    prefill_launch(q, kv_layer, batch, kind, out, tiling, longer_than).run()
    return out


def prefill_launch(
    q: Tensor,
    kv_layer: Tensor,
    batch: PagedBatch,
    kind: AttentionKind,
    out: Tensor,
    tiling: PrefillTiling,
    longer_than: int = 0,
) -> Launch:
    """What `prefill_attention` runs."""
    check_operands(q, kv_layer, batch, out)
    num_rows, num_q_heads, _ = q.shape
    num_kv_heads = kv_layer.shape[3]
    assert num_q_heads // num_kv_heads <= tiling.rows
    queries = tiling.rows // (num_q_heads // num_kv_heads)
    keys, values = stored_sides(kv_layer)
    return Launch(
        kernel=prefill_kernel,
        grid=(num_kv_heads, num_rows // queries + batch.num_seqs + 1),
        args={
            "q_ptr": q,
            "keys_ptr": keys,
            "values_ptr": values,
            "out_ptr": out,
            "cu_query_lens_ptr": batch.cu_query_lens,
            "context_lens_ptr": batch.context_lens,
            "block_tables_ptr": batch.block_tables,
            "num_seqs": batch.num_seqs,
            "num_rows": num_rows,
            "q_stride": q.stride(0),
            "out_stride": out.stride(0),
            "block_stride": kv_layer.stride(1),
            "token_stride": kv_layer.stride(2),
            "table_stride": batch.block_tables.stride(0),
            "score_scale": kind.scale * kind.k_scale,
            "v_scale": kind.v_scale,
        },
        constexprs=_constexprs(q, kv_layer, kind, tiling) | {"LONGER_THAN": longer_than},
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )


def _constexprs(q: Tensor, kv_layer: Tensor, kind: AttentionKind, tiling: PrefillTiling) -> dict[str, Any]:
    head_dim = q.shape[2]
    return {
        "GROUP": q.shape[1] // kv_layer.shape[3],
        "ROWS": tiling.rows,
        "HEAD_DIM": head_dim,
        "COLUMNS": padded_head_dim(head_dim),
        "BLOCK_SIZE": kv_layer.shape[2],
        "TILE": tiling.tile,
        "WINDOW": kind.window or 0,
        "SOFT_CAP": kind.soft_cap or 0.0,
        "DTYPE": operand_dtype(q),
        "PRECISION": "ieee",
    }


def default_tiling(
    q: Tensor, kv_layer: Tensor, batch: PagedBatch, capability: int | None = None
) -> PrefillTiling:
    """The largest tiles that spill no registers, by the sizes of a model and its longest chunk.

    capability: of the GPU, as in sm_90; None: that of q's.
    """
    group_size = q.shape[1] // kv_layer.shape[3]
    assert group_size <= MAX_ROWS
    if q.dtype == torch.float32:
        # No tensor cores: every product is kept in registers.
        rows = max(triton.next_power_of_2(group_size), 16)
        return PrefillTiling(rows=rows, tile=32, num_warps=8, num_stages=2)
    is_wide, arch = q.shape[2] > 128, capability or compute_capability(q.device)
    # A100, and the many with 99 KiB of shared memory; against H100, H200, B200 with 227.
    is_small = not 90 <= arch < 120
    most = MAX_ROWS // 2 if is_wide and is_small else MAX_ROWS
    # Two sizes, for each is compiled apart: one group of heads, or as many rows as there may be.
    fewest = max(triton.next_power_of_2(group_size), 16)
    rows = fewest if group_size * batch.max_query_len <= fewest else most
    return PrefillTiling(
        rows=rows,
        tile=32 if is_wide or is_small else 64,
        num_warps=8 if is_wide or rows == MAX_ROWS else 4,
        num_stages=2 if is_wide and is_small else 3,
    )
