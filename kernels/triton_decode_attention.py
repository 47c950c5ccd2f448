"""Paged attention of a few queries per request, on a GPU: decoding, and verification of draft tokens.

The context of a request is split among programs (flash decoding, Dao et al. 2023), whose results a second
kernel combines. Grids depend on capacities only; lengths and block tables are read from device memory, so one
captured CUDA graph serves any batch that fits. The bits of a request's result depend on its own queries and
context, on `DecodeTiling` and on the queries that a tile has room for, not on the rest of the batch.
"""

from dataclasses import dataclass, replace
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.paged_batch import FEW_QUERIES, AttentionKind, PagedBatch
from kernels.triton_attention import (
    attend,
    check_operands,
    compute_capability,
    num_multiprocessors,
    operand_dtype,
    padded_head_dim,
    stored_sides,
)
from kernels.triton_launch import Launch

MAX_QUERY_LEN: Final = FEW_QUERIES
MAX_SPLITS: Final = 128
SPLITS_AT_ONCE: Final = tl.constexpr(16)
"""Partial results that the combining program holds."""
TILE_BYTES: Final = 16 * 1024
"""Of the keys of one step: two pipelined steps of keys and values keep an H200's memory busy."""
PROGRAMS_PER_MULTIPROCESSOR: Final = 4
"""Enough to fill a GPU whose multiprocessors run two at a time, and to level out unequal contexts."""


@dataclass(frozen=True, kw_only=True)
class DecodeTiling:
    """How contexts are cut."""

    num_splits: int
    """Most parts of one context, a power of two; fewer where they would be shorter than `min_split_len`."""
    tile: int
    """Keys of one step, a power of two of at least 16."""
    min_split_len: int = 256
    """Fewest keys of a split, but for the last one; a multiple of `tile`."""


@triton.jit
def _splits(
    context_len: tl.tensor, query_len: tl.tensor, most: tl.tensor,
    MIN_SPLIT_LEN: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """(oldest visible key, where the first split begins, keys of a split, number of splits <= most)."""
    oldest = context_len * 0
    if WINDOW > 0:
        oldest = tl.maximum(context_len - query_len + 1 - WINDOW, 0)
    begin = oldest // TILE * TILE
    split_len = (context_len - begin + most * TILE - 1) // (most * TILE) * TILE
    split_len = tl.maximum(split_len, MIN_SPLIT_LEN)
    return oldest, begin, split_len, (context_len - begin + split_len - 1) // split_len


@triton.jit
def _clear_spare_rows(
    heads_ptr: tl.tensor, out_stride: tl.tensor, cu_query_lens_ptr: tl.tensor, num_rows: tl.tensor,
    query: tl.tensor, in_head: tl.tensor, MAX_QUERY_LEN: tl.constexpr,
) -> None:  # fmt: skip
    """Zeros in this request's share of the rows of no request. heads_ptr: of each tile row, in row 0."""
    seq, num_seqs = tl.program_id(2), tl.num_programs(2)
    first_spare = tl.load(cu_query_lens_ptr + num_seqs) + seq * MAX_QUERY_LEN
    for start in range(first_spare, num_rows, num_seqs * MAX_QUERY_LEN):
        row = start + query
        mask = ((query < MAX_QUERY_LEN) & (row < num_rows))[:, None] & in_head
        rows_ptr = heads_ptr + row.to(tl.int64) * out_stride
        tl.store(rows_ptr[:, None] + tl.arange(0, in_head.shape[1])[None, :], 0.0, mask=mask)


@triton.jit(do_not_specialize=["num_rows", "table_stride"])
def decode_kernel(
    q_ptr: tl.tensor, keys_ptr: tl.tensor, values_ptr: tl.tensor, out_ptr: tl.tensor,
    partial_ptr: tl.tensor, partial_lse_ptr: tl.tensor,
    cu_query_lens_ptr: tl.tensor, context_lens_ptr: tl.tensor, block_tables_ptr: tl.tensor,
    num_rows: tl.tensor, q_stride: tl.tensor, out_stride: tl.tensor,
    block_stride: tl.tensor, token_stride: tl.tensor, table_stride: tl.tensor,
    score_scale: tl.tensor, v_scale: tl.tensor,
    GROUP: tl.constexpr, MAX_QUERY_LEN: tl.constexpr, ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
    MIN_SPLIT_LEN: tl.constexpr,
    WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """One KV head of one split of one request: grid (num_kv_heads, most splits, num_seqs).

    Tile row r is query r // GROUP, head r % GROUP of the group. A request with one split is finished here;
    others leave fp32 [num_rows, num_q_heads, most splits, HEAD_DIM] results and their base-2 log-sum-exp.
    """
    kv_head, split, seq = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    context_len = tl.load(context_lens_ptr + seq)
    first_row = tl.load(cu_query_lens_ptr + seq)
    query_len = tl.load(cu_query_lens_ptr + seq + 1) - first_row
    query = tl.arange(0, ROWS) // GROUP
    head = kv_head * GROUP + tl.arange(0, ROWS) % GROUP
    columns = tl.arange(0, COLUMNS)
    in_head = columns[None, :] < HEAD_DIM
    if split == 0:
        _clear_spare_rows(
            out_ptr + head * HEAD_DIM, out_stride, cu_query_lens_ptr, num_rows, query, in_head, MAX_QUERY_LEN
        )
    if query_len > MAX_QUERY_LEN:
        return
    oldest, begin, split_len, num_splits = _splits(
        context_len, query_len, tl.num_programs(1), MIN_SPLIT_LEN, TILE, WINDOW
    )
    if split >= tl.maximum(num_splits, 1):
        return
    begin += split * split_len
    row = (first_row + query).to(tl.int64)
    mask = (query < query_len)[:, None] & in_head
    q_rows = q_ptr + row * q_stride + head * HEAD_DIM
    queries = tl.load(q_rows[:, None] + columns[None, :], mask=mask, other=0).to(DTYPE)
    total, weight, peak = attend(
        queries, context_len - query_len + query,
        tl.zeros((ROWS, COLUMNS), dtype=tl.float32), tl.zeros((ROWS,), dtype=tl.float32),
        tl.full((ROWS,), float("-inf"), dtype=tl.float32),
        keys_ptr + kv_head * HEAD_DIM, values_ptr + kv_head * HEAD_DIM,
        block_tables_ptr + seq.to(tl.int64) * table_stride, block_stride, token_stride,
        begin, tl.minimum(begin + split_len, context_len), oldest, context_len, score_scale,
        BLOCK_SIZE, HEAD_DIM, TILE, WINDOW, SOFT_CAP, PRECISION, True,
    )  # fmt: skip
    result = total / tl.where(weight == 0, 1.0, weight)[:, None]
    if num_splits <= 1:
        out_rows = out_ptr + row * out_stride + head * HEAD_DIM
        final = (result * v_scale).to(out_ptr.dtype.element_ty)
        tl.store(out_rows[:, None] + columns[None, :], final, mask=mask)
    else:
        part = (row * (tl.num_programs(0) * GROUP) + head) * tl.num_programs(1) + split
        tl.store(partial_ptr + part[:, None] * HEAD_DIM + columns[None, :], result, mask=mask)
        lse = peak + tl.log2(tl.where(weight == 0, 1.0, weight))
        tl.store(partial_lse_ptr + part, lse, mask=query < query_len)


@triton.jit
def combine_kernel(
    partial_ptr: tl.tensor, partial_lse_ptr: tl.tensor, out_ptr: tl.tensor,
    cu_query_lens_ptr: tl.tensor, context_lens_ptr: tl.tensor, out_stride: tl.tensor, v_scale: tl.tensor,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
    NUM_SPLITS: tl.constexpr, MIN_SPLIT_LEN: tl.constexpr, WINDOW: tl.constexpr,
) -> None:  # fmt: skip
    """The sum of one head of one query over its splits: grid (num_q_heads, MAX_QUERY_LEN, num_seqs)."""
    head, query, seq = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    context_len = tl.load(context_lens_ptr + seq)
    first_row = tl.load(cu_query_lens_ptr + seq)
    query_len = tl.load(cu_query_lens_ptr + seq + 1) - first_row
    num_splits = _splits(context_len, query_len, NUM_SPLITS, MIN_SPLIT_LEN, TILE, WINDOW)[3]
    if query >= query_len or query_len > tl.num_programs(1) or num_splits <= 1:
        return
    row = (first_row + query).to(tl.int64)
    first_part = (row * tl.num_programs(0) + head) * NUM_SPLITS
    splits = tl.arange(0, NUM_SPLITS)
    lse = tl.load(partial_lse_ptr + first_part + splits, mask=splits < num_splits, other=float("-inf"))
    peak = tl.max(lse, 0)
    weight = tl.sum(tl.exp2(lse - peak), 0)
    columns = tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    CHUNK: tl.constexpr = NUM_SPLITS if NUM_SPLITS < SPLITS_AT_ONCE else SPLITS_AT_ONCE
    for start in range(0, num_splits, CHUNK):
        parts = start + tl.arange(0, CHUNK)
        is_part = parts < num_splits
        part_lse = tl.load(partial_lse_ptr + first_part + parts, mask=is_part, other=float("-inf"))
        places = (first_part + parts)[:, None] * HEAD_DIM + columns[None, :]
        mask = is_part[:, None] & (columns[None, :] < HEAD_DIM)
        results = tl.load(partial_ptr + places, mask=mask, other=0.0)
        total += tl.sum(results * tl.exp2(part_lse - peak)[:, None], 0)
    result = (total / weight * v_scale).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * out_stride + head * HEAD_DIM + columns, result, mask=columns < HEAD_DIM)


def decode_attention(
    q: Tensor,
    kv_layer: Tensor,
    batch: PagedBatch,
    kind: AttentionKind,
    *,
    tiling: DecodeTiling | None = None,
    max_query_len: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`paged_batch.paged_attention` for requests of at most MAX_QUERY_LEN queries; allocates in torch's pool.

    q: [num_rows, num_q_heads, head_dim], rows any distance apart; kv_layer: [2, num_blocks, block_size,
    num_kv_heads, head_dim], of q's type, float8_e4m3fn, or uint8 with the bits of that.
    max_query_len: requests with more queries are left out, their rows of `out` are not written; None: the
    batch's, so that there are none.
    """
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if max_query_len is not None:
        batch = replace(batch, max_query_len=max_query_len)
    for launch in decode_launches(
        q, kv_layer, batch, kind, out, tiling or default_tiling(q, kv_layer, batch)
    ):
        launch.run()
    return out


def decode_launches(
    q: Tensor, kv_layer: Tensor, batch: PagedBatch, kind: AttentionKind, out: Tensor, tiling: DecodeTiling
) -> list[Launch]:
    """What `decode_attention` runs, for requests of at most batch.max_query_len queries."""
    _check(q, kv_layer, batch, out, tiling)
    num_rows, num_q_heads, head_dim = q.shape
    num_kv_heads = kv_layer.shape[3]
    parts = (num_rows, num_q_heads, tiling.num_splits) if tiling.num_splits > 1 else (1, 1, 1)
    args: dict[str, Tensor | float] = {
        "out_ptr": out,
        "partial_ptr": q.new_empty((*parts, head_dim), dtype=torch.float32),
        "partial_lse_ptr": q.new_empty(parts, dtype=torch.float32),
        "cu_query_lens_ptr": batch.cu_query_lens,
        "context_lens_ptr": batch.context_lens,
        "out_stride": out.stride(0),
        "v_scale": kind.v_scale,
    }
    constexprs = {
        "HEAD_DIM": head_dim,
        "COLUMNS": padded_head_dim(head_dim),
        "TILE": tiling.tile,
        "MIN_SPLIT_LEN": tiling.min_split_len,
        "WINDOW": kind.window or 0,
    }
    decode = Launch(
        kernel=decode_kernel,
        grid=(num_kv_heads, tiling.num_splits, batch.num_seqs),
        args=args | _decode_args(q, kv_layer, batch, kind),
        constexprs=constexprs | _decode_constexprs(q, kv_layer, batch, kind),
        num_warps=8 if q.dtype == torch.float32 else 4,
    )
    combine = Launch(
        kernel=combine_kernel,
        grid=(num_q_heads, batch.max_query_len, batch.num_seqs),
        args=args,
        constexprs=constexprs | {"NUM_SPLITS": tiling.num_splits},
    )
    return [decode, combine] if tiling.num_splits > 1 else [decode]


def _check(q: Tensor, kv_layer: Tensor, batch: PagedBatch, out: Tensor, tiling: DecodeTiling) -> None:
    check_operands(q, kv_layer, batch, out)
    assert batch.max_query_len <= MAX_QUERY_LEN
    assert tiling.num_splits <= MAX_SPLITS
    assert tiling.min_split_len % tiling.tile == 0


def _decode_args(
    q: Tensor, kv_layer: Tensor, batch: PagedBatch, kind: AttentionKind
) -> dict[str, Tensor | float]:
    keys, values = stored_sides(kv_layer)
    return {
        "q_ptr": q,
        "keys_ptr": keys,
        "values_ptr": values,
        "block_tables_ptr": batch.block_tables,
        "num_rows": len(q),
        "q_stride": q.stride(0),
        "block_stride": kv_layer.stride(1),
        "token_stride": kv_layer.stride(2),
        "table_stride": batch.block_tables.stride(0),
        "score_scale": kind.scale * kind.k_scale,
    }


def _decode_constexprs(q: Tensor, kv_layer: Tensor, batch: PagedBatch, kind: AttentionKind) -> dict[str, Any]:
    group_size = q.shape[1] // kv_layer.shape[3]
    return {
        "GROUP": group_size,
        "MAX_QUERY_LEN": batch.max_query_len,
        "ROWS": _tile_rows(q, kv_layer, batch),
        "BLOCK_SIZE": kv_layer.shape[2],
        "SOFT_CAP": kind.soft_cap or 0.0,
        "DTYPE": operand_dtype(q),
        "PRECISION": "ieee",
    }


def _tile_rows(q: Tensor, kv_layer: Tensor, batch: PagedBatch) -> int:
    """Query heads of one tile."""
    num_rows: int = triton.next_power_of_2(q.shape[1] // kv_layer.shape[3] * batch.max_query_len)
    return max(16, num_rows)


def default_tiling(q: Tensor, kv_layer: Tensor, batch: PagedBatch) -> DecodeTiling:
    """By capacities only: the same for all steps of a captured graph."""
    step_bytes = padded_head_dim(q.shape[2]) * kv_layer.element_size()
    tile = min(max(TILE_BYTES // step_bytes, 16), 64)
    if _tile_rows(q, kv_layer, batch) > 32 and not 90 <= compute_capability(q.device) < 120:
        tile = min(tile, 32)  # so many queries beside it: there may be no more than 99 KiB of shared memory
    min_split_len = max(DecodeTiling.min_split_len, tile)
    programs = PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors(q.device)
    wanted = programs // (kv_layer.shape[3] * batch.num_seqs)
    useful = -(-batch.max_context_len // min_split_len)
    num_splits = triton.next_power_of_2(max(min(wanted, useful, MAX_SPLITS), 1))
    return DecodeTiling(num_splits=num_splits, tile=tile, min_split_len=min_split_len)
