"""How much memory a GPU has for the KV pool: what is free once the largest step has run, or a share of it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from engine.batch import MIN_ROWS, Batch, Span, pack
from engine.block_table import BlockTable
from engine.config import EngineConfig
from engine.device_memory import CudaMeter, Meter
from engine.drawing import Draw, draw_fused
from engine.kv_pool import LocalKvPool
from engine.loader import LoadedModel
from engine.models.decoder import Decoder
from engine.parallel.ranks import Ranks
from engine.parallel.wire import Op
from engine.request import SamplingParams
from engine.step.factory import captures, step_shapes

PROFILED_SAMPLING = SamplingParams(max_tokens=1, top_k=2, top_p=0.5)
"""Whatever a draw needs memory for."""


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """What was measured on GPUs that hold the weights, one for each rank."""

    free_bytes: int
    """Behind the step, with its memory given back; what libraries took for themselves is not free. Of the GPU
    that has least."""
    step_bytes: int
    """Most that the largest step took on top of weights and KV."""


def kv_cache_bytes(memory: DeviceMemory, *, utilization: float, captured: bool, linked_bytes: int = 0) -> int:
    """Memory of the KV pool: the share `utilization` of what is left when steps and KV links have their own.

    Captured steps keep theirs, which no other can use: they share it, those of a draft model too, and none is
    larger than the largest.
    `linked_bytes` are still free when the pool is made: links are made on demand.
    """
    needed = memory.step_bytes * (2 if captured else 1) + linked_bytes
    return max(int((memory.free_bytes - needed) * utilization), 0)


def with_kv_memory(config: EngineConfig, model: LoadedModel, meter: Meter | None = None) -> EngineConfig:
    """The config with `kv_cache_memory_bytes` measured, if it is for a GPU and leaves them open.

    Every rank of a worker has a GPU of its own; all get as much as fits into the fullest.
    """
    device = torch.device(config.device)
    if (device.type != "cuda" and meter is None) or config.num_blocks or config.kv_cache_memory_bytes:
        return config
    memory = profile(config, model, meter or CudaMeter(device))
    own = kv_cache_bytes(
        memory,
        utilization=config.gpu_memory_utilization,
        captured=captures(config),
        linked_bytes=config.linked_memory_bytes,
    )
    return replace(config, kv_cache_memory_bytes=max(own * model.ranks.shard.size, 1))


def profile(config: EngineConfig, model: LoadedModel, meter: Meter) -> DeviceMemory:
    """Run the largest step over a pool that holds nothing else, and look at what it took, on this rank."""
    step_bytes = meter.peak_bytes(partial(_run_largest_step, config, model, _small_pool(config, model)))
    free_bytes = [meter.free_bytes(), *_free_elsewhere(model.ranks)]
    return DeviceMemory(step_bytes=step_bytes, free_bytes=min(free_bytes))


def _free_elsewhere(ranks: Ranks) -> list[int]:
    """Free bytes of every other rank's device, behind all that it was told before."""
    ranks.tell(Op.MEASURE)
    return [message.lists[0][0] for message in ranks.answers(Op.MEASURED)]


def _small_pool(config: EngineConfig, model: LoadedModel) -> list[Tensor]:
    """All KV groups, with blocks for the longest prompt of a step."""
    ranks, (target, *others) = model.ranks, model.facts.kv_groups
    local = LocalKvPool(
        [ranks.shard.kv_spec(target), *others],
        num_blocks=-(-config.max_num_batched_tokens // config.block_size),
        block_size=config.block_size,
        num_host_blocks=0,
        device=torch.device(config.device),
    )
    return ranks.lead_pool(local).groups


@torch.inference_mode()
def _run_largest_step(config: EngineConfig, model: LoadedModel, kv_groups: Sequence[Tensor]) -> None:
    """As many prompt tokens as a step may have, also for the draft model, and a draw for every row that may
    be sampled: a pass of the draft has no more of these.

    Prompts share their blocks: nobody reads the results.
    """
    length = min(config.max_num_batched_tokens, model.facts.max_model_len)
    table = BlockTable(range(-(-length // config.block_size)))
    spans = [
        Span(table=table, start=0, token_ids=[0] * min(length, config.max_num_batched_tokens - first))
        for first in range(0, config.max_num_batched_tokens, length)
    ]
    batch = pack(spans, block_size=config.block_size, device=kv_groups[0].device)
    if model.draft is not None:
        _compute(model.draft.module, batch, kv_groups[-1])
    hidden = _compute(model.module, batch, kv_groups[0])
    num_rows = max(step_shapes(config).max_num_rows, MIN_ROWS)
    logits = model.module.logits(hidden[:1].expand(num_rows, -1).contiguous())
    draw_fused(logits, [Draw(PROFILED_SAMPLING, position, 0) for position in range(num_rows)])


def _compute(module: Decoder, batch: Batch, kv_group: Tensor) -> Tensor:
    return module.forward(batch.token_ids, batch.positions, kv_group, batch.slot_mapping, batch.attention)
