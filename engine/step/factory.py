"""The captured steps that an engine's config asks for, on every rank that computes its model."""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch

from engine.config import EngineConfig
from engine.kv_cache import KvCache
from engine.loader import LoadedModel
from engine.step.decode_step import DecodeStep, DrawingStep
from engine.step.flights import Flights
from engine.step.graphs import Recorder, StepGraphs, recorder_for
from engine.step.shapes import StepShapes, usual_sizes, widths
from engine.step.spec import StepSpec
from engine.step.step_ranks import StepRanks
from runtime.clock import SystemClock

logger = logging.getLogger(__name__)

CAPTURED_DRAFT_TOKENS = 7
"""Of a captured step where the number of draft tokens is chosen step by step."""


class Steps(NamedTuple):
    """Ways to run a decode step other than kernel by kernel."""

    graphs: StepGraphs | None
    """None: there are none."""
    flights: Flights | None
    """None: every step is waited for before the next one is scheduled."""


def make_recorder(config: EngineConfig) -> Recorder:
    """One for all steps of an engine, whose graphs share their memory."""
    return recorder_for(torch.device(config.device), captured=captures(config))


def make_steps(config: EngineConfig, model: LoadedModel, kv_cache: KvCache, recorder: Recorder) -> Steps:
    """Captured steps on a GPU; overlap needs steps over fixed buffers on any device."""
    if not captures(config):
        return steps_with(recorder, config, model, kv_cache) if overlaps(config) else Steps(None, None)
    clock = SystemClock()
    start = clock.now()
    steps = steps_with(recorder, config, model, kv_cache)
    logger.info("captured the decode steps in %.1f s", clock.now() - start)
    return steps


def captures(config: EngineConfig) -> bool:
    """Whether decode steps are captured."""
    return config.cuda_graphs == "auto" and torch.device(config.device).type == "cuda"


def overlaps(config: EngineConfig) -> bool:
    """Whether a step may start before the one before it has ended: not if it has drafts to propose first."""
    return config.speculative == "off" and may_overlap(config)


def may_overlap(config: EngineConfig) -> bool:
    """Whether anything starts before what comes before it has ended."""
    on_gpu = torch.device(config.device).type == "cuda"
    return config.overlap == "on" or (config.overlap == "auto" and on_gpu)


def steps_with(recorder: Recorder, config: EngineConfig, model: LoadedModel, kv_cache: KvCache) -> Steps:
    """All shapes of this engine, recorded."""
    spec, kv_group = step_spec(config, model), kv_cache.groups[0]
    ranks = model.ranks.lead_steps(model.module, spec)
    inputs, max_num_rows = spec.inputs(kv_group.device), spec.shapes.max_num_rows
    if not spec.draws:
        return Steps(_recorded(DecodeStep(ranks.module, kv_group, inputs), spec, recorder, ranks), None)
    step = DrawingStep(ranks.module, kv_group, inputs, max_num_rows=max_num_rows, share=ranks.share)
    graphs = _recorded(step, spec, recorder, ranks)
    return Steps(graphs, Flights(graphs, step.drawn))


def _recorded(step: DecodeStep, spec: StepSpec, recorder: Recorder, ranks: StepRanks) -> StepGraphs:
    graphs = StepGraphs(step, spec.shapes, recorder, ranks)
    graphs.capture()
    return graphs


def step_spec(config: EngineConfig, model: LoadedModel) -> StepSpec:
    """What the steps of this engine are fixed to."""
    return StepSpec(
        sizes=tuple(padded_sizes(config)),
        widths=tuple(_widths(config)),
        max_model_len=model.facts.max_model_len,
        block_size=config.block_size,
        draws=overlaps(config),
        captured=captures(config),
    )


def step_shapes(config: EngineConfig) -> StepShapes:
    """For batches of at most `max_num_seqs` requests, with as many draft tokens as there may be."""
    return StepShapes(padded_sizes(config), _widths(config))


def padded_sizes(config: EngineConfig) -> Sequence[int]:
    """Numbers of requests that steps are padded to."""
    return config.cuda_graph_sizes or usual_sizes(config.max_num_seqs)


def _widths(config: EngineConfig) -> list[int]:
    if config.speculative == "off":
        return widths(0)
    return widths(CAPTURED_DRAFT_TOKENS if config.num_draft_tokens is None else config.num_draft_tokens)
