"""The captured steps that an engine's config asks for."""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch

from engine.config import EngineConfig
from engine.kv_cache import KvCache
from engine.loader import LoadedModel
from engine.parallel.ranks import Ranks
from engine.step.decode_step import DecodeStep, DrawingStep
from engine.step.flights import Flights
from engine.step.graphs import CudaGraphs, Recorder, StepGraphs, Uncaptured
from engine.step.inputs import StepInputs
from engine.step.shapes import StepShapes, usual_sizes, widths
from runtime.clock import SystemClock

logger = logging.getLogger(__name__)

MAX_DRAFT_TOKENS = 7
"""Of a captured step where the number of draft tokens is chosen step by step."""


class Steps(NamedTuple):
    """Ways to run a decode step other than kernel by kernel."""

    graphs: StepGraphs | None
    """None: there are none."""
    flights: Flights | None
    """None: every step is waited for before the next one is scheduled."""


def make_recorder(config: EngineConfig, ranks: Ranks) -> Recorder:
    """One for all steps of an engine, whose graphs share their memory."""
    return CudaGraphs(torch.device(config.device)) if captures(config, ranks) else Uncaptured()


def make_steps(config: EngineConfig, model: LoadedModel, kv_cache: KvCache, recorder: Recorder) -> Steps:
    """Captured steps on a GPU; overlap needs steps over fixed buffers on any device.

    Other ranks are told every step what to compute, which no graph can do, so they have neither.
    """
    if not captures(config, model.ranks):
        has_steps = overlaps(config) and model.ranks.shard.size == 1
        return steps_with(recorder, config, model, kv_cache) if has_steps else Steps(None, None)
    clock = SystemClock()
    start = clock.now()
    steps = steps_with(recorder, config, model, kv_cache)
    logger.info("captured the decode steps in %.1f s", clock.now() - start)
    return steps


def captures(config: EngineConfig, ranks: Ranks) -> bool:
    """Whether decode steps are captured."""
    on_gpu = torch.device(config.device).type == "cuda"
    return config.cuda_graphs == "auto" and on_gpu and ranks.shard.size == 1


def overlaps(config: EngineConfig) -> bool:
    """Whether a step may start before the one before it has ended: not if it has drafts to propose first."""
    return config.speculative == "off" and may_overlap(config)


def may_overlap(config: EngineConfig) -> bool:
    """Whether anything starts before what comes before it has ended."""
    on_gpu = torch.device(config.device).type == "cuda"
    return config.overlap == "on" or (config.overlap == "auto" and on_gpu)


def steps_with(recorder: Recorder, config: EngineConfig, model: LoadedModel, kv_cache: KvCache) -> Steps:
    """All shapes of this engine, recorded."""
    shapes, module, kv_group = step_shapes(config), model.module, kv_cache.groups[0]
    inputs = StepInputs(
        max_num_seqs=shapes.max_num_seqs,
        max_num_rows=shapes.max_num_rows,
        max_model_len=model.facts.max_model_len,
        block_size=config.block_size,
        device=kv_group.device,
    )
    if not overlaps(config):
        return Steps(_recorded(DecodeStep(module, kv_group, inputs), shapes, recorder), None)
    step = DrawingStep(module, kv_group, inputs, max_num_rows=shapes.max_num_rows)
    graphs = _recorded(step, shapes, recorder)
    return Steps(graphs, Flights(graphs, step.drawn))


def _recorded(step: DecodeStep, shapes: StepShapes, recorder: Recorder) -> StepGraphs:
    graphs = StepGraphs(step, shapes, recorder)
    graphs.capture()
    return graphs


def step_shapes(config: EngineConfig) -> StepShapes:
    """For batches of at most `max_num_seqs` requests, with as many draft tokens as there may be."""
    max_draft_tokens = 0
    if config.speculative != "off":
        max_draft_tokens = MAX_DRAFT_TOKENS if config.num_draft_tokens is None else config.num_draft_tokens
    return StepShapes(padded_sizes(config), widths(max_draft_tokens))


def padded_sizes(config: EngineConfig) -> Sequence[int]:
    """Numbers of requests that steps are padded to."""
    return config.cuda_graph_sizes or usual_sizes(config.max_num_seqs)
