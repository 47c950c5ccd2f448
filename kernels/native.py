"""The operators for fp32 on a CPU, in C: one pass over memory where torch needs one per operation.

`native.c` is compiled once per machine, when a process first needs it; what other types, other devices and
machines without a compiler get are the torch references.
"""

import ctypes
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from kernels import attention, layers, paged_kv, summed_copies
from kernels.attention import AttentionBatch, DecodeRows
from kernels.checksums import WORD_BYTES, weights
from kernels.native_build import load_library

LANES: Final = 8
"""Floats of a vector in native.c; a head is a whole number of them."""

CPU: Final = torch.device("cpu")

POINTER, INTEGER, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float

SIGNATURES: Final = {
    "add_rms_norm": [*[POINTER] * 4, INTEGER, INTEGER, FLOAT],
    "silu_mul": [POINTER, POINTER, INTEGER, INTEGER],
    "rope": [POINTER, INTEGER, POINTER, POINTER, POINTER, INTEGER, INTEGER, INTEGER],
    "store_rows": [POINTER, INTEGER, POINTER, POINTER, INTEGER, INTEGER],
    "copy_blocks": [*[POINTER] * 3, *[INTEGER] * 7, POINTER, POINTER],
    "paged_decode": [
        POINTER, INTEGER, *[POINTER] * 7, *[INTEGER] * 5, FLOAT, POINTER, INTEGER,
    ],
}  # fmt: skip
"""Argument types of each function; none returns anything."""

_library = load_library(SIGNATURES)


def available() -> bool:
    """Whether the library was built and loaded."""
    return _library is not None


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See kernels.layers."""
    if _library is None or not _dense(x, residual, weight):
        return layers.add_rms_norm(x, residual, weight, eps)
    out = torch.empty_like(x)
    rows, hidden = x.shape
    _library.add_rms_norm(
        x.data_ptr(), residual.data_ptr(), weight.data_ptr(), out.data_ptr(), rows, hidden, eps
    )
    return out


def silu_mul(gate_up: Tensor) -> Tensor:
    """See kernels.layers."""
    if _library is None or not _dense(gate_up):
        return layers.silu_mul(gate_up)
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    _library.silu_mul(gate_up.data_ptr(), out.data_ptr(), rows, width)
    return out


def rope(heads: Tensor, positions: Tensor, cos_table: Tensor, sin_table: Tensor) -> None:
    """See kernels.layers."""
    if _library is None or not (_dense_rows(heads) and _dense(cos_table, sin_table)):
        layers.rope(heads, positions, cos_table, sin_table)
        return
    rows, num_heads, head_dim = heads.shape
    _library.rope(
        heads.data_ptr(), heads.stride(0), positions.data_ptr(), cos_table.data_ptr(), sin_table.data_ptr(),
        rows, num_heads, head_dim // 2,
    )  # fmt: skip


def store_kv(k: Tensor, v: Tensor, kv_layer: Tensor, slot_mapping: Tensor) -> None:
    """See kernels.paged_kv."""
    if _library is None or not (_dense(kv_layer) and _dense_rows(k) and _dense_rows(v)):
        paged_kv.store_kv(k, v, kv_layer, slot_mapping)
        return
    slots, count, width = slot_mapping.data_ptr(), len(slot_mapping), k.shape[1] * k.shape[2]
    for rows, side in zip((k, v), kv_layer, strict=True):
        _library.store_rows(rows.data_ptr(), rows.stride(0), side.data_ptr(), slots, count, width)


def gather_blocks_summed(
    group: Tensor, block_ids: Sequence[int], first_layer: int, num_layers: int, slab: Tensor
) -> tuple[int, Tensor]:
    """See kernels.summed_copies."""
    layers_of = group.narrow(0, first_layer, num_layers)
    if _library is None or not _in_words(layers_of, slab):
        return summed_copies.gather_blocks_summed(group, block_ids, first_layer, num_layers, slab)
    return _copy_blocks(_library, layers_of, block_ids, slab, to_slab=True)


def scatter_blocks_summed(
    group: Tensor, block_ids: Sequence[int], first_layer: int, num_layers: int, slab: Tensor
) -> tuple[int, Tensor]:
    """See kernels.summed_copies."""
    layers_of = group.narrow(0, first_layer, num_layers)
    if _library is None or not _in_words(layers_of, slab):
        return summed_copies.scatter_blocks_summed(group, block_ids, first_layer, num_layers, slab)
    return _copy_blocks(_library, layers_of, block_ids, slab, to_slab=False)


def _copy_blocks(
    library: ctypes.CDLL, group: Tensor, block_ids: Sequence[int], slab: Tensor, *, to_slab: bool
) -> tuple[int, Tensor]:
    """All layers of `group`; any dtype."""
    ids = torch.as_tensor(block_ids, dtype=torch.int64)
    assert all(0 <= block_id < group.shape[2] for block_id in block_ids)
    num_bytes = group[:, :, 0].numel() * group.element_size() * len(ids)
    assert num_bytes <= slab.numel(), f"payload of {num_bytes} bytes, slab of {slab.numel()}"
    total = torch.empty((), dtype=torch.int64)
    words = [stride * group.element_size() // WORD_BYTES for stride in group.stride()[:3]]
    run_words = group[0, 0, 0].nbytes // WORD_BYTES
    # Held by this call: two threads that need a new table at once make two, and the cache keeps one.
    factors = weights(num_bytes // WORD_BYTES, CPU)
    library.copy_blocks(
        group.data_ptr(), slab.data_ptr(), ids.data_ptr(), *words, group.shape[0], len(ids), run_words,
        to_slab, factors.data_ptr(), total.data_ptr(),
    )  # fmt: skip
    return num_bytes, total


def _in_words(layers_of: Tensor, slab: Tensor) -> bool:
    """Whether every block is a dense run of whole words, and all lies on the host."""
    block = layers_of[0, 0, 0]
    return (
        layers_of.device.type == slab.device.type == "cpu"
        and block.is_contiguous()
        and block.nbytes % WORD_BYTES == 0
        and layers_of.data_ptr() % WORD_BYTES == slab.data_ptr() % WORD_BYTES == 0
        and all(stride * layers_of.element_size() % WORD_BYTES == 0 for stride in layers_of.stride()[:3])
    )


def paged_attention(q: Tensor, kv_layer: Tensor, batch: AttentionBatch, scale: float) -> Tensor:
    """See kernels.attention."""
    if _library is None or not (_dense_rows(q) and _dense(kv_layer)) or q.shape[2] % LANES:
        return attention.paged_attention(q, kv_layer, batch, scale)
    out = attention.empty_output(q, batch)
    _decode(_library, q, kv_layer, batch.decode_rows, scale, out)
    attention.prefill(q, kv_layer, batch, scale, out)
    return out


def _decode(
    library: ctypes.CDLL, q: Tensor, kv_layer: Tensor, rows: DecodeRows, scale: float, out: Tensor
) -> None:
    _, _, block_size, num_kv_heads, head_dim = kv_layer.shape
    num_q_heads = q.shape[1]
    scratch = q.new_empty(num_q_heads, rows.longest)
    library.paged_decode(
        q.data_ptr(), q.stride(0), kv_layer.data_ptr(), kv_layer[1].data_ptr(), out.data_ptr(),
        rows.rows.data_ptr(), rows.context_lens.data_ptr(), rows.first_blocks.data_ptr(),
        rows.block_ids.data_ptr(), len(rows.rows), block_size, num_kv_heads, num_q_heads // num_kv_heads,
        head_dim, scale, scratch.data_ptr(), rows.longest,
    )  # fmt: skip


def _dense(*tensors: Tensor) -> bool:
    return all(
        tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.is_contiguous()
        for tensor in tensors
    )


def _dense_rows(heads: Tensor) -> bool:
    """[rows, heads, head_dim]: each row dense, rows any distance apart."""
    return (
        heads.dtype == torch.float32
        and heads.device.type == "cpu"
        and heads.stride()[1:] == (heads.shape[2], 1)
    )
