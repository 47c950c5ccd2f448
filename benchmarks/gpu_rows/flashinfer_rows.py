"""Our kernels beside flashinfer's, where that is installed and builds on this machine."""

from functools import partial
from importlib import metadata
from typing import Any

import torch

from benchmarks.gpu_rows.attention_case import BLOCK_SIZE, AttentionCase
from benchmarks.gpu_rows.bench import Bench, RowFunctions
from benchmarks.gpu_rows.row import Measured
from benchmarks.gpu_rows.sampler import TEMPERATURE, TOP_K, TOP_P, Logits
from benchmarks.gpu_rows.timing import Timing, time_device, time_launched

WORKSPACE_BYTES = 256 << 20


def rows(bench: Bench) -> RowFunctions:
    """See catalogue.kernels and catalogue.sampler."""
    return {
        "paged decode attention beside flashinfer, 8B, batch 32, 1k": partial(decode_attention, bench),
        "sampler beside flashinfer, top-k and top-p, batch 32": partial(sampler, bench),
    }


def _flashinfer(bench: Bench) -> Any:
    if bench.device.type != "cuda":
        raise RuntimeError("flashinfer needs a GPU")
    import flashinfer

    return flashinfer


def _beside(ours: Timing, theirs: Timing) -> Measured:
    details = ours.details | {"flashinfer": metadata.version("flashinfer-python")}
    return Measured(value=ours.seconds * 1e6, floor=theirs.seconds * 1e6, details=details)


def decode_attention(bench: Bench) -> Measured:
    """The same queries over the same blocks, in the layout that both read."""
    flashinfer = _flashinfer(bench)
    shape = bench.shape("8B")
    case = AttentionCase(bench, shape, batch=32, context_len=1024)
    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=bench.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    as_int32 = partial(torch.tensor, dtype=torch.int32, device=bench.device)
    wrapper.plan(
        as_int32([row * case.blocks_per_seq for row in range(case.batch + 1)]),
        case.tables.flatten(), as_int32([BLOCK_SIZE] * case.batch),
        shape.num_q_heads, shape.num_kv_heads, shape.head_dim, BLOCK_SIZE,
        q_data_type=bench.dtype, kv_data_type=bench.dtype,
    )  # fmt: skip
    theirs = time_device(bench, [partial(wrapper.run, case.q, (pool[0], pool[1])) for pool in case.pools])
    return _beside(time_device(bench, case.calls()), theirs)


def sampler(bench: Bench) -> Measured:
    """Both from logits; theirs draws from torch's generator, which a graph cannot hold: both are launched."""
    flashinfer = _flashinfer(bench)
    logits = Logits(bench)
    draw = flashinfer.sampling.top_k_top_p_sampling_from_logits
    theirs = time_launched(bench, [partial(draw, each / TEMPERATURE, TOP_K, TOP_P) for each in logits.sets])
    ours = time_launched(bench, logits.draws(logits.truncation(TEMPERATURE, TOP_K, TOP_P)))
    return _beside(ours, theirs)
