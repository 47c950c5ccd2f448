"""The captured steps that an engine's config asks for."""

import logging

import torch

from engine.config import EngineConfig
from engine.kv_cache import KvCache
from engine.loader import LoadedModel
from engine.step.decode_step import DecodeStep
from engine.step.graphs import CudaGraphs, Recorder, StepGraphs
from engine.step.inputs import StepInputs
from engine.step.shapes import StepShapes, usual_sizes, widths
from runtime.clock import SystemClock

logger = logging.getLogger(__name__)

MAX_DRAFT_TOKENS = 7
"""Of a captured step where the number of draft tokens is chosen step by step."""


def make_graphs(config: EngineConfig, model: LoadedModel, kv_cache: KvCache) -> StepGraphs | None:
    """Captured steps; None: all steps run kernel by kernel.

    Other ranks are told every step what to compute, which no graph can do.
    """
    device = torch.device(config.device)
    if config.cuda_graphs == "off" or device.type != "cuda" or model.ranks.shard.size > 1:
        return None
    clock = SystemClock()
    start = clock.now()
    graphs = graphs_with(CudaGraphs(device), config, model, kv_cache)
    logger.info("captured %d decode steps in %.1f s", len(list(graphs.shapes)), clock.now() - start)
    return graphs


def graphs_with(
    recorder: Recorder, config: EngineConfig, model: LoadedModel, kv_cache: KvCache
) -> StepGraphs:
    """All shapes of this engine, recorded."""
    shapes = step_shapes(config)
    inputs = StepInputs(
        max_num_seqs=shapes.max_num_seqs,
        max_num_rows=shapes.max_num_rows,
        max_model_len=model.facts.max_model_len,
        block_size=config.block_size,
        device=torch.device(config.device),
    )
    graphs = StepGraphs(DecodeStep(model.module, kv_cache.groups[0], inputs), shapes, recorder)
    graphs.capture()
    return graphs


def step_shapes(config: EngineConfig) -> StepShapes:
    """For batches of at most `max_num_seqs` requests, with as many draft tokens as there may be."""
    sizes = config.cuda_graph_sizes or usual_sizes(config.max_num_seqs)
    max_draft_tokens = 0
    if config.speculative != "off":
        max_draft_tokens = MAX_DRAFT_TOKENS if config.num_draft_tokens is None else config.num_draft_tokens
    return StepShapes(sizes, widths(max_draft_tokens))
