"""What the Triton attention kernels share: softmax attention of a tile of query rows over keys and values in
blocks of a KV pool, one tile of keys after another.

Online softmax as in FlashAttention (Dao 2023, arXiv 2307.08691), in base 2. The query heads of one KV head
are rows of the same tile, so that keys and values are loaded once for the group.
"""

import math
from functools import lru_cache
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.paged_batch import PagedBatch
from kernels.triton_launch import INTERPRETED

LOG2_E: Final = tl.constexpr(math.log2(math.e))
E4M3_FACTOR: Final = tl.constexpr(2.0**8)
"""e4m3's bits in fp16's places stand for a number 2**8 too small: its exponents have a bias of 7, not 15."""
OPERAND_DTYPES: Final = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _from_e4m3_bits(bits: tl.tensor) -> tl.tensor:
    """fp16 of float8_e4m3fn given as uint8, for GPUs that do not know the type; NaN stays NaN."""
    wide = bits.to(tl.int16)
    moved = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    value = moved.to(tl.float16, bitcast=True) * E4M3_FACTOR
    return tl.where((wide & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def _stored(pointers: tl.tensor, mask: tl.tensor, MASKED: tl.constexpr, DTYPE: tl.constexpr) -> tl.tensor:
    """Elements of the pool as operands of a matrix product; 0 outside the mask."""
    if MASKED:
        raw = tl.load(pointers, mask=mask, other=0.0)
    else:
        raw = tl.load(pointers)
    if raw.dtype == tl.uint8:
        raw = _from_e4m3_bits(raw)
    return raw.to(DTYPE)


@triton.jit
def _block_ids(
    table_ptr: tl.tensor, keys_at: tl.tensor, oldest: tl.tensor, context_len: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """int32, of the same shape as keys_at; 0 for keys outside oldest … context_len - 1."""
    mask = (keys_at >= oldest) & (keys_at < context_len)
    return tl.load(table_ptr + keys_at // BLOCK_SIZE, mask=mask, other=0)


@triton.jit
def _tanh(x: tl.tensor) -> tl.tensor:
    """Accurate to fp32 on both sides: the series near 0, where the quotient cancels."""
    decay = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - decay) / (1.0 + decay)
    x2 = x * x
    near = x * (1.0 + x2 * (-1.0 / 3 + x2 * (2.0 / 15 + x2 * (-17.0 / 315 + x2 * (62.0 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))


@triton.jit
def attend(
    queries: tl.tensor, positions: tl.tensor, total: tl.tensor, weight: tl.tensor, peak: tl.tensor,
    keys_ptr: tl.tensor, values_ptr: tl.tensor, table_ptr: tl.tensor,
    block_stride: tl.tensor, token_stride: tl.tensor,
    begin: tl.tensor, end: tl.tensor, oldest: tl.tensor, context_len: tl.tensor, score_scale: tl.tensor,
    BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Adds the keys from `begin` to `end`, in steps of TILE, to (total, weight, peak) and returns them.

    total: fp32 [rows, columns]: sum of probabilities times values, 0 in columns from HEAD_DIM on;
    weight: fp32 [rows]: sum of probabilities; peak: fp32 [rows]: largest score so far; all in units of
    2**peak. queries: [rows, columns], in the type of the products; positions: int32 [rows]; keys_ptr,
    values_ptr: this KV head in block 0; table_ptr: the request's block ids. Only keys oldest …
    context_len - 1 are read. Without MASKED every row sees every key, and all of them are in that range.
    score_scale: of q·k, positive.
    """
    columns = tl.arange(0, queries.shape[1])
    offsets = tl.arange(0, TILE)
    HAS_MASK: tl.constexpr = MASKED or queries.shape[1] != HEAD_DIM
    factor = score_scale * LOG2_E
    if SOFT_CAP > 0:
        factor = SOFT_CAP * LOG2_E
    # Block ids are loaded one step ahead: a chain of loads within one step is not pipelined as deeply.
    next_ids = _block_ids(table_ptr, begin + offsets, oldest, context_len, BLOCK_SIZE)
    for start in range(begin, end, TILE):
        keys_at = start + offsets
        stored = (keys_at >= oldest) & (keys_at < context_len)
        block_ids = next_ids
        next_ids = _block_ids(table_ptr, keys_at + TILE, oldest, context_len, BLOCK_SIZE)
        slots = block_ids.to(tl.int64) * block_stride + (keys_at % BLOCK_SIZE) * token_stride
        places = slots[:, None] + columns[None, :]
        mask = stored[:, None] & (columns[None, :] < HEAD_DIM)
        keys = _stored(keys_ptr + places, mask, HAS_MASK, queries.dtype)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        if SOFT_CAP > 0:
            scores = _tanh(scores * (score_scale / SOFT_CAP))
        if MASKED:
            visible = stored[None, :] & (keys_at[None, :] <= positions[:, None])
            if WINDOW > 0:
                visible &= keys_at[None, :] > positions[:, None] - WINDOW
            scores = tl.where(visible, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1) * factor)
        anchor = new_peak
        if MASKED:
            # Of a row that has seen no key yet -inf would be taken from -inf.
            anchor = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        probs = tl.exp2(scores * factor - anchor[:, None])
        decay = tl.exp2(peak - anchor)
        weight = weight * decay + tl.sum(probs, 1)
        values = _stored(values_ptr + places, mask, HAS_MASK, queries.dtype)
        total = tl.dot(probs.to(queries.dtype), values, total * decay[:, None], input_precision=PRECISION)
        peak = new_peak
    return total, weight, peak


def padded_head_dim(head_dim: int) -> int:
    """Columns of a tile: tiles have powers of two, matrix products at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def operand_dtype(q: Tensor) -> Any:
    """Type of the matrix products; the interpreter has no arithmetic for bf16."""
    if INTERPRETED and q.dtype == torch.bfloat16:
        return tl.float32
    return OPERAND_DTYPES[q.dtype]


def stored_sides(kv_layer: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values as kernels read them: e4m3 as bits where the GPU does not know the type."""
    if kv_layer.dtype == torch.float8_e4m3fn and compute_capability(kv_layer.device) < 89:
        kv_layer = kv_layer.view(torch.uint8)
    return kv_layer[0], kv_layer[1]


@lru_cache
def compute_capability(device: torch.device) -> int:
    """Of a GPU, as in sm_90; elsewhere that of an H200, for launches that are not run on a GPU."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


@lru_cache
def num_multiprocessors(device: torch.device) -> int:
    """Of a GPU; elsewhere that of an H200."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def check_operands(q: Tensor, kv_layer: Tensor, batch: PagedBatch, out: Tensor) -> None:
    """Shapes, types and strides that the kernels rely on."""
    num_q_heads, head_dim = q.shape[1:]
    assert out.shape == q.shape
    assert out.stride()[1:] == (head_dim, 1)
    assert kv_layer.shape[0] == 2
    assert kv_layer.shape[4] == head_dim
    assert num_q_heads % kv_layer.shape[3] == 0
    assert q.stride()[1:] == (head_dim, 1)
    assert kv_layer.stride()[3:] == (head_dim, 1)
    assert q.dtype in OPERAND_DTYPES
    assert kv_layer.dtype in (q.dtype, torch.float8_e4m3fn, torch.uint8)
    batch.check()
