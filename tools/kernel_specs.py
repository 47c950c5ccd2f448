"""Every Triton kernel as it is launched for models of common shapes, for `tools.compile_kernels`.

Launches are made from meta tensors: what is compiled here is what a GPU would compile at its first launch.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.paged_batch import AttentionKind, PagedBatch
from kernels.triton_decode_attention import decode_launches, default_tiling
from kernels.triton_launch import Launch

ARCHITECTURES = (80, 90, 100)
"""A100, H100 and H200, B200."""


PLAIN = AttentionKind(scale=128**-0.5)


@dataclass(frozen=True, kw_only=True)
class KernelSpec:
    """One kernel with the arguments of one launch."""

    name: str
    launch: Launch
    archs: tuple[int, ...] = ARCHITECTURES
    allowed_stack_bytes: int = 0
    """Of each thread: known spills that were judged harmless."""


def specs() -> Iterable[KernelSpec]:
    """All of them; names are distinct."""
    yield from decode_attention_specs()


def decode_attention_specs() -> Iterable[KernelSpec]:
    """Shapes are (num_q_heads, num_kv_heads, head_dim)."""
    fp16, fp32, fp8 = torch.float16, torch.float32, torch.float8_e4m3fn
    yield from _decode("llama8b.bf16", (32, 8, 128))
    yield from _decode("llama8b.bf16.block64", (32, 8, 128), block_size=64)
    yield from _decode("llama8b.bf16.verify8", (32, 8, 128), query_len=8)
    yield from _decode("llama8b.fp16.1split", (32, 8, 128), dtype=fp16, num_splits=1)
    yield from _decode("llama8b.bf16.fp8", (32, 8, 128), pool=fp8, archs=(90, 100))
    yield from _decode("llama8b.bf16.fp8bits", (32, 8, 128), pool=torch.uint8, archs=(80,))
    yield from _decode("llama8b.fp32", (32, 8, 128), dtype=fp32)
    yield from _decode("qwen2_7b.bf16", (28, 4, 128))
    yield from _decode("qwen3_0.6b.bf16", (16, 8, 128))
    yield from _decode("llama1b.bf16", (32, 8, 64))
    yield from _decode("phi2.bf16", (32, 32, 80))
    gemma = AttentionKind(scale=256**-0.5, window=4096, soft_cap=50.0)
    yield from _decode("gemma2_9b.bf16", (16, 8, 256), kind=gemma)
    yield from _decode("gemma2_9b.bf16.verify8", (16, 8, 256), kind=gemma, query_len=8)


def _decode(
    name: str,
    heads: tuple[int, int, int],
    *,
    dtype: torch.dtype = torch.bfloat16,
    pool: torch.dtype | None = None,
    block_size: int = 16,
    query_len: int = 1,
    num_splits: int | None = None,
    kind: AttentionKind = PLAIN,
    archs: tuple[int, ...] = ARCHITECTURES,
) -> Iterable[KernelSpec]:
    q, kv_layer, batch = _attention(heads, dtype, pool or dtype, block_size, 32, query_len)
    tiling = default_tiling(q, kv_layer, batch)
    tiling = replace(tiling, num_splits=num_splits or tiling.num_splits)
    for launch in decode_launches(q, kv_layer, batch, kind, torch.empty_like(q), tiling):
        kernel = launch.kernel.__name__.removesuffix("_kernel")
        yield KernelSpec(name=f"attention.{kernel}.{name}", launch=launch, archs=archs)


def _attention(
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    pool: torch.dtype,
    block_size: int,
    num_seqs: int,
    query_len: int,
) -> tuple[Tensor, Tensor, PagedBatch]:
    """(q, one layer of a pool, batch)."""
    num_q_heads, num_kv_heads, head_dim = heads
    qkv = _meta(num_seqs * query_len, num_q_heads + 2 * num_kv_heads, head_dim, dtype=dtype)
    kv_layer = _meta(2, 4096, block_size, num_kv_heads, head_dim, dtype=pool)
    batch = PagedBatch(
        cu_query_lens=_meta(num_seqs + 1, dtype=torch.int32),
        context_lens=_meta(num_seqs, dtype=torch.int32),
        block_tables=_meta(num_seqs, 8192 // block_size, dtype=torch.int32),
        max_query_len=query_len,
        max_context_len=8192,
    )
    return qkv[:, :num_q_heads], kv_layer, batch


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
