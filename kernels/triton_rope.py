"""Rotary embedding of queries and keys and the write of keys and values to their slots, in one launch."""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.rope_store import HeadNorms
from kernels.triton_launch import Launch

TILE_ELEMENTS: Final = 1024
"""Of the heads of one program."""


@triton.jit(do_not_specialize=["num_tokens"])
def rope_store_kernel(
    heads_ptr: tl.tensor, positions_ptr: tl.tensor, cos_ptr: tl.tensor, sin_ptr: tl.tensor,
    k_pool_ptr: tl.tensor, v_pool_ptr: tl.tensor, slots_ptr: tl.tensor,
    q_weight_ptr: tl.tensor, k_weight_ptr: tl.tensor,
    row_stride: tl.tensor, block_stride: tl.tensor, slot_stride: tl.tensor, num_tokens: tl.tensor,
    eps: tl.tensor,
    NUM_Q_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    NORM: tl.constexpr, TILE_HEADS: tl.constexpr, TILE_HALF: tl.constexpr,
) -> None:  # fmt: skip
    """A few heads of one row per program, each as its two halves: [TILE_HEADS, TILE_HALF]."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * TILE_HEADS + tl.arange(0, TILE_HEADS)[:, None]
    HALF: tl.constexpr = HEAD_DIM // 2
    column = tl.arange(0, TILE_HALF)[None, :]
    mask = (head < NUM_Q_HEADS + 2 * NUM_KV_HEADS) & (column < HALF)
    is_q = head < NUM_Q_HEADS
    is_v = head >= NUM_Q_HEADS + NUM_KV_HEADS
    places = heads_ptr + row * row_stride + head * HEAD_DIM + column
    first = tl.load(places, mask=mask, other=0.0)
    second = tl.load(places + HALF, mask=mask, other=0.0)
    dtype = first.dtype
    first, second = first.to(tl.float32), second.to(tl.float32)
    if NORM:
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        scale = tl.where(is_v, 1.0, tl.rsqrt(squares / HEAD_DIM + eps)[:, None])
        first = _weighted(
            first * scale, q_weight_ptr + column, k_weight_ptr + column, mask, is_q, is_v, dtype
        )
        second = _weighted(
            second * scale,
            q_weight_ptr + HALF + column,
            k_weight_ptr + HALF + column,
            mask,
            is_q,
            is_v,
            dtype,
        )
    angle = tl.load(positions_ptr + row) * HALF + column
    cos = tl.load(cos_ptr + angle, mask=column < HALF, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=column < HALF, other=0.0)
    turned_first = tl.where(is_v, first, first * cos - second * sin).to(dtype)
    turned_second = tl.where(is_v, second, second * cos + first * sin).to(dtype)
    tl.store(places, turned_first, mask=mask & is_q)
    tl.store(places + HALF, turned_second, mask=mask & is_q)
    slot = tl.load(slots_ptr + row, mask=row < num_tokens, other=-1)
    at_slot = (slot // BLOCK_SIZE) * block_stride + (slot % BLOCK_SIZE) * slot_stride + column
    is_stored = mask & (slot >= 0)
    is_k = is_stored & (head >= NUM_Q_HEADS) & (head < NUM_Q_HEADS + NUM_KV_HEADS)
    k_places = k_pool_ptr + at_slot + (head - NUM_Q_HEADS) * HEAD_DIM
    v_places = v_pool_ptr + at_slot + (head - NUM_Q_HEADS - NUM_KV_HEADS) * HEAD_DIM
    tl.store(k_places, turned_first, mask=is_k)
    tl.store(k_places + HALF, turned_second, mask=is_k)
    tl.store(v_places, turned_first, mask=is_stored & is_v)
    tl.store(v_places + HALF, turned_second, mask=is_stored & is_v)


@triton.jit
def _weighted(
    normed: tl.tensor, q_weights: tl.tensor, k_weights: tl.tensor, mask: tl.tensor,
    is_q: tl.tensor, is_v: tl.tensor, dtype: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Each head times the weights of its kind, rounded as the torch reference rounds; values as they are."""
    q_weight = tl.load(q_weights, mask=mask & is_q, other=0.0).to(tl.float32)
    k_weight = tl.load(k_weights, mask=mask & ~is_q & ~is_v, other=0.0).to(tl.float32)
    weighted = normed.to(dtype).to(tl.float32) * tl.where(is_q, q_weight, k_weight)
    return tl.where(is_v, normed, weighted.to(dtype).to(tl.float32))


def rope_store_kv(
    heads: Tensor,
    positions: Tensor,
    cos_table: Tensor,
    sin_table: Tensor,
    kv_layer: Tensor,
    slot_mapping: Tensor,
    norms: HeadNorms | None = None,
) -> None:
    """See kernels.rope_store."""
    rope_store_launch(heads, positions, cos_table, sin_table, kv_layer, slot_mapping, norms).run()


def rope_store_launch(
    heads: Tensor,
    positions: Tensor,
    cos_table: Tensor,
    sin_table: Tensor,
    kv_layer: Tensor,
    slot_mapping: Tensor,
    norms: HeadNorms | None,
) -> Launch:
    """`rope_store_kv`."""
    num_rows, num_heads, head_dim = heads.shape
    _, _, block_size, num_kv_heads, _ = kv_layer.shape
    _check(heads, positions, (cos_table, sin_table), kv_layer, slot_mapping)
    tile_half = triton.next_power_of_2(head_dim // 2)
    tile_heads = min(triton.next_power_of_2(num_heads), max(TILE_ELEMENTS // (2 * tile_half), 1))
    return Launch(
        kernel=rope_store_kernel,
        grid=(num_rows, triton.cdiv(num_heads, tile_heads)),
        args={
            "heads_ptr": heads,
            "positions_ptr": positions,
            "cos_ptr": cos_table,
            "sin_ptr": sin_table,
            "k_pool_ptr": kv_layer[0],
            "v_pool_ptr": kv_layer[1],
            "slots_ptr": slot_mapping,
            "q_weight_ptr": norms.q_weight if norms else cos_table,
            "k_weight_ptr": norms.k_weight if norms else cos_table,
            "row_stride": heads.stride(0),
            "block_stride": kv_layer.stride(1),
            "slot_stride": kv_layer.stride(2),
            "num_tokens": slot_mapping.shape[0],
            "eps": norms.eps if norms else 0.0,
        },
        constexprs={
            "NUM_Q_HEADS": num_heads - 2 * num_kv_heads,
            "NUM_KV_HEADS": num_kv_heads,
            "HEAD_DIM": head_dim,
            "BLOCK_SIZE": block_size,
            "NORM": norms is not None,
            "TILE_HEADS": tile_heads,
            "TILE_HALF": tile_half,
        },
    )


def _check(
    heads: Tensor, positions: Tensor, tables: tuple[Tensor, Tensor], kv_layer: Tensor, slot_mapping: Tensor
) -> None:
    """Shapes, types and strides that the kernel relies on."""
    num_rows, num_heads, head_dim = heads.shape
    assert head_dim % 2 == 0
    assert heads.stride()[1:] == (head_dim, 1)
    assert kv_layer.shape[0] == 2
    assert kv_layer.shape[4] == head_dim
    assert kv_layer.stride()[3:] == (head_dim, 1)
    assert kv_layer.dtype == heads.dtype
    assert num_heads > 2 * kv_layer.shape[3]
    assert positions.shape == (num_rows,)
    assert positions.dtype == slot_mapping.dtype == torch.int64
    assert slot_mapping.shape[0] <= num_rows
    assert positions.is_contiguous()
    assert slot_mapping.is_contiguous()
    for table in tables:
        assert table.shape[1] == head_dim // 2
        assert table.is_contiguous()
        assert table.dtype == torch.float32
