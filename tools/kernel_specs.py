"""Every Triton kernel as it is launched for models of common shapes, for `tools.compile_kernels`.

Launches are made from meta tensors: what is compiled here is what a GPU would compile at its first launch.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels import triton_decode_attention, triton_prefill_attention
from kernels.paged_batch import AttentionKind, PagedBatch
from kernels.rope_store import HeadNorms
from kernels.triton_blocks import copy_blocks_launch
from kernels.triton_launch import Launch
from kernels.triton_layers import rms_norm_launch, silu_mul_launch
from kernels.triton_rope import rope_store_launch
from kernels.triton_sampling import draw_launches
from kernels.triton_verification import count_accepted_launch, rejection_launches
from kernels.truncation import Truncation

ARCHITECTURES = (80, 90, 100)
"""A100, H100 and H200, B200."""


PLAIN = AttentionKind(scale=128**-0.5)
GEMMA = AttentionKind(scale=256**-0.5, window=4096, soft_cap=50.0)


@dataclass(frozen=True, kw_only=True)
class KernelSpec:
    """One kernel with the arguments of one launch."""

    name: str
    launch: Launch
    archs: tuple[int, ...] = ARCHITECTURES
    allowed_stack_bytes: int = 0
    """Of each thread: known spills that were judged harmless."""


def specs() -> Iterable[KernelSpec]:
    """All of them; a name stands once for each architecture."""
    yield from decode_attention_specs()
    yield from prefill_attention_specs()
    yield from layer_specs()
    yield from block_specs()
    yield from sampling_specs()


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
    yield from _decode("gemma2_9b.bf16", (16, 8, 256), kind=GEMMA)
    yield from _decode("gemma2_9b.bf16.verify8", (16, 8, 256), kind=GEMMA, query_len=8)


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
    tiling = triton_decode_attention.default_tiling(q, kv_layer, batch)
    tiling = replace(tiling, num_splits=num_splits or tiling.num_splits)
    for launch in triton_decode_attention.decode_launches(
        q, kv_layer, batch, kind, torch.empty_like(q), tiling
    ):
        kernel = launch.kernel.__name__.removesuffix("_kernel")
        yield KernelSpec(name=f"attention.{kernel}.{name}", launch=launch, archs=archs)


def prefill_attention_specs() -> Iterable[KernelSpec]:
    """Chunks of a prompt; `short` has the smaller tiles of a few queries."""
    fp16, fp32, fp8 = torch.float16, torch.float32, torch.float8_e4m3fn
    yield from _prefill("llama8b.bf16", (32, 8, 128))
    yield from _prefill("llama8b.bf16.block64", (32, 8, 128), block_size=64)
    yield from _prefill("llama8b.bf16.short", (32, 8, 128), query_len=16)
    yield from _prefill("llama8b.fp16", (32, 8, 128), dtype=fp16)
    yield from _prefill("llama8b.bf16.fp8", (32, 8, 128), pool=fp8, archs=(90, 100))
    yield from _prefill("llama8b.bf16.fp8bits", (32, 8, 128), pool=torch.uint8, archs=(80,))
    yield from _prefill("llama8b.fp32", (32, 8, 128), dtype=fp32)
    yield from _prefill("qwen2_7b.bf16", (28, 4, 128))
    yield from _prefill("llama1b.bf16", (32, 8, 64))
    yield from _prefill("phi2.bf16", (32, 32, 80))
    yield from _prefill("gemma2_9b.bf16", (16, 8, 256), kind=GEMMA)


def _prefill(
    name: str,
    heads: tuple[int, int, int],
    *,
    dtype: torch.dtype = torch.bfloat16,
    pool: torch.dtype | None = None,
    block_size: int = 16,
    query_len: int = 512,
    kind: AttentionKind = PLAIN,
    archs: tuple[int, ...] = ARCHITECTURES,
) -> Iterable[KernelSpec]:
    q, kv_layer, batch = _attention(heads, dtype, pool or dtype, block_size, 4, query_len)
    for arch in archs:
        tiling = triton_prefill_attention.default_tiling(q, kv_layer, batch, capability=arch)
        launch = triton_prefill_attention.prefill_launch(
            q, kv_layer, batch, kind, torch.empty_like(q), tiling
        )
        yield KernelSpec(name=f"attention.prefill.{name}", launch=launch, archs=(arch,))


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


def layer_specs() -> Iterable[KernelSpec]:
    """Norms, SwiGLU, and rotary embedding with the write of keys and values."""
    bf16, fp32 = torch.bfloat16, torch.float32
    for name, hidden, dtype in (
        ("llama8b.bf16", 4096, bf16),
        ("llama8b.fp32", 4096, fp32),
        ("qwen2_0.5b.bf16", 896, bf16),
        ("llama405b.bf16", 16384, bf16),
    ):
        x, weight = _meta(32, hidden, dtype=dtype), _meta(hidden, dtype=dtype)
        for kind, residual in (("rms_norm", None), ("add_rms_norm", x)):
            launch = rms_norm_launch(x, residual, weight, 1e-5, torch.empty_like(x))
            yield KernelSpec(name=f"layers.{kind}.{name}", launch=launch)
    gate_up = _meta(32, 2 * 14336, dtype=bf16)
    launch = silu_mul_launch(gate_up, gate_up.new_empty(32, 14336))
    yield KernelSpec(name="layers.silu_mul.llama8b.bf16", launch=launch)
    head_norms = HeadNorms(_meta(128, dtype=bf16), _meta(128, dtype=bf16), 1e-6)
    yield _rope_store("llama8b.bf16", (32, 8, 128), None)
    yield _rope_store("phi2.bf16", (32, 32, 80), None)
    yield _rope_store("qwen3_8b.bf16", (32, 8, 128), head_norms)


def _rope_store(name: str, heads: tuple[int, int, int], norms: HeadNorms | None) -> KernelSpec:
    num_q_heads, num_kv_heads, head_dim = heads
    table = _meta(8192, head_dim // 2, dtype=torch.float32)
    launch = rope_store_launch(
        _meta(32, num_q_heads + 2 * num_kv_heads, head_dim, dtype=torch.bfloat16),
        _meta(32, dtype=torch.int64),
        table,
        table,
        _meta(2, 4096, 16, num_kv_heads, head_dim, dtype=torch.bfloat16),
        _meta(32, dtype=torch.int64),
        norms,
    )
    return KernelSpec(name=f"layers.rope_store.{name}", launch=launch)


def block_specs() -> Iterable[KernelSpec]:
    """Copies between pool and slab."""
    group = _meta(32, 2, 4096, 16, 8, 128, dtype=torch.bfloat16)
    slab, block_ids = _meta(32 << 20, dtype=torch.uint8), range(128)
    for summed in (False, True):
        for to_slab in (True, False):
            launch, _ = copy_blocks_launch(group, block_ids, 4, 4, slab, to_slab=to_slab, summed=summed)
            kind = ("gather" if to_slab else "scatter") + ("_summed" if summed else "")
            yield KernelSpec(name=f"blocks.{kind}.llama8b.bf16", launch=launch)


def sampling_specs() -> Iterable[KernelSpec]:
    """Draws and verification with the vocabularies of Llama 3 and of GPT-2."""
    keys = [_meta(32, dtype=torch.int64)] * 3
    fp32, int32 = torch.float32, torch.int32
    truncation = Truncation(*(_meta(32, dtype=dtype) for dtype in (fp32, int32, fp32, fp32)))
    draft_ids = _meta(32, 5, dtype=torch.int64)
    for name, vocab_size in (("llama3", 128_256), ("gpt2", 50_257)):
        logits, drafts = (_meta(num_rows, vocab_size, dtype=fp32) for num_rows in (32 * 6, 32 * 5))
        yield from _chain(f"sample.{name}", draw_launches(logits[:32], None, *keys)[0])
        yield from _chain(f"draw.{name}", draw_launches(logits[:32], truncation, *keys)[0])
        yield from _chain(f"verify.{name}", rejection_launches(logits, drafts, draft_ids, *keys)[0])
    launch = count_accepted_launch(draft_ids, _meta(32, 6, dtype=torch.int64), keys[0])
    yield KernelSpec(name="sampling.count_accepted", launch=launch)


def _chain(name: str, launches: Iterable[Launch]) -> Iterable[KernelSpec]:
    by_kernel = {launch.kernel.__name__.removesuffix("_kernel"): launch for launch in launches}
    return [
        KernelSpec(name=f"sampling.{kernel}.{name}", launch=launch) for kernel, launch in by_kernel.items()
    ]


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
