"""Single operators, as `kernels.ops` binds them, against bandwidth."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu_rows import floors
from benchmarks.gpu_rows.attention_case import AttentionCase
from benchmarks.gpu_rows.bench import Bench, RowFunctions, scaled
from benchmarks.gpu_rows.catalogue import COPIES, DECODE_KERNELS, LAYER_KERNELS
from benchmarks.gpu_rows.row import Measured
from benchmarks.gpu_rows.timing import Call, Timing, time_device
from kernels import ops
from kernels.attention import AttentionBatch

BLOCK_SIZE = 16
PROMPT_LEN = 8192


def rows(bench: Bench) -> RowFunctions:
    """See catalogue.kernels."""
    functions: dict[str, Callable[[], Measured]] = {}
    for name, case in DECODE_KERNELS.items():
        functions[f"paged decode attention, {name}"] = partial(decode_attention, bench, *case)
    for name in COPIES:
        functions[f"{name} of 8k tokens, 8B"] = partial(copy, bench, name)
    for name in LAYER_KERNELS:
        functions[f"{name}, 8B, 8k rows"] = partial(layer_kernel, bench, name)
    functions["prefill attention, 8B, 8k"] = partial(prefill_attention, bench)
    return functions


def against_bytes(bench: Bench, timing: Timing, **num_bytes: float) -> Measured:
    """A row in µs beside what the bytes alone would take."""
    floor = scaled(bench.floor_s(**num_bytes), 1e6)
    rate = sum(num_bytes.values()) / timing.seconds * 1e-9
    details = timing.details | {"GB/s": round(rate, 1), "MB": round(sum(num_bytes.values()) * 1e-6, 3)}
    return Measured(value=timing.seconds * 1e6, floor=floor, details=details)


def decode_attention(bench: Bench, shape_name: str, batch: int, context_len: int) -> Measured:
    """One layer of a decode step over a paged pool, with the capacities of a captured step."""
    case = AttentionCase(
        bench, bench.shape(shape_name), batch=bench.pick(batch, 2), context_len=bench.pick(context_len, 64)
    )
    timing = time_device(bench, case.calls())
    return against_bytes(bench, timing, read=case.num_bytes)


def copy(bench: Bench, name: str) -> Measured:
    """Blocks of a prompt between pool and slab: each byte is read once and written once."""
    shape = bench.shape("8B")
    num_blocks = bench.pick(PROMPT_LEN, 64) // BLOCK_SIZE
    size = (shape.num_layers, 2, 2 * num_blocks, BLOCK_SIZE, shape.num_kv_heads, shape.head_dim)
    group = torch.empty(size, dtype=bench.dtype, device=bench.device).normal_()
    block_ids = torch.randperm(2 * num_blocks)[:num_blocks].tolist()
    slab = torch.empty(group.nbytes // 2, dtype=torch.uint8, device=bench.device)
    timing = time_device(bench, [_copy_call(name, group, block_ids, slab)], rounds=10)
    return against_bytes(bench, timing, copied=2 * slab.nbytes)


def _copy_call(name: str, group: Tensor, block_ids: list[int], slab: Tensor) -> Call:
    """The launch alone: the operator also sends the block ids, which a graph cannot hold."""
    to_slab, summed = name.startswith("gather"), name.endswith("checksum")
    if group.is_cuda:
        from kernels.triton_blocks import copy_blocks_launch

        launch, _ = copy_blocks_launch(group, block_ids, 0, len(group), slab, to_slab=to_slab, summed=summed)
        return launch.run
    plain = ops.gather_blocks if to_slab else ops.scatter_blocks
    with_sum = ops.gather_blocks_summed if to_slab else ops.scatter_blocks_summed
    return partial(with_sum if summed else plain, group, block_ids, 0, len(group), slab)


def layer_kernel(bench: Bench, name: str) -> Measured:
    """What a layer does between its products, over the rows of a chunk."""
    num_rows = bench.pick(PROMPT_LEN, 16)
    call, num_bytes = {"add_rms_norm": _norm, "silu_mul": _silu_mul, "rope_store_kv": _rope_store}[name](
        bench, num_rows
    )
    return against_bytes(bench, time_device(bench, [call]), copied=num_bytes)


def _random(bench: Bench, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=bench.dtype, device=bench.device).normal_()


def _norm(bench: Bench, num_rows: int) -> tuple[Call, float]:
    """x and residual are read, residual and result are written."""
    hidden = bench.shape("8B").hidden
    x, residual = _random(bench, num_rows, hidden), _random(bench, num_rows, hidden)
    return partial(ops.add_rms_norm, x, residual, _random(bench, hidden), 1e-5), 4.0 * x.nbytes


def _silu_mul(bench: Bench, num_rows: int) -> tuple[Call, float]:
    gate_up = _random(bench, num_rows, 2 * bench.shape("8B").mlp)
    return partial(ops.silu_mul, gate_up), 1.5 * gate_up.nbytes


def _rope_store(bench: Bench, num_rows: int) -> tuple[Call, float]:
    """q is read and written in place, k and v are read and written to their slots."""
    shape = bench.shape("8B")
    heads = _random(bench, num_rows, shape.num_q_heads + 2 * shape.num_kv_heads, shape.head_dim)
    pool = _random(bench, 2, num_rows // BLOCK_SIZE, BLOCK_SIZE, shape.num_kv_heads, shape.head_dim)
    angles = torch.rand(num_rows, shape.head_dim // 2, device=bench.device)
    positions = torch.arange(num_rows, device=bench.device)
    call = partial(ops.rope_store_kv, heads, positions, angles.cos(), angles.sin(), pool, positions)
    return call, 2.0 * heads.nbytes


def prefill_attention(bench: Bench) -> Measured:
    """One layer over a whole prompt; torch's own attention on unpaged keys beside it."""
    shape, length = bench.shape("8B"), bench.pick(PROMPT_LEN, 64)
    num_blocks = length // BLOCK_SIZE
    pool = _random(bench, 2, num_blocks, BLOCK_SIZE, shape.num_kv_heads, shape.head_dim)
    batch = AttentionBatch(
        query_lens=[length], context_lens=[length], block_tables=[torch.randperm(num_blocks).tolist()],
        block_size=BLOCK_SIZE, device=bench.device,
    )  # fmt: skip
    q = _random(bench, length, shape.num_q_heads, shape.head_dim)
    timing = time_device(
        bench, [partial(ops.paged_attention, q, pool, batch, shape.head_dim**-0.5)], rounds=10
    )
    flops = floors.attention_flops(shape, length)
    details = timing.details | {
        "TFLOP/s": round(flops / timing.seconds * 1e-12, 1),
        "torch's, µs": round(_torch_attention(bench, q, shape.num_kv_heads).seconds * 1e6, 1),
    }
    floor = scaled(bench.floor_s(flops=flops), 1e6)
    return Measured(value=timing.seconds * 1e6, floor=floor, details=details)


def _torch_attention(bench: Bench, q: Tensor, num_kv_heads: int) -> Timing:
    queries = q.transpose(0, 1).unsqueeze(0)
    keys, values = (_random(bench, 1, num_kv_heads, q.shape[0], q.shape[2]) for _ in range(2))
    attend = partial(
        torch.nn.functional.scaled_dot_product_attention, queries, keys, values, is_causal=True,
        enable_gqa=True,
    )  # fmt: skip
    return time_device(bench, [attend], rounds=10)
