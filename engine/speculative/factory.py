"""The speculation that an engine's config asks for."""

from collections.abc import Callable
from time import perf_counter, thread_time

import torch

from engine.config import EngineConfig
from engine.kv_cache import KvCache
from engine.loader import LoadedModel
from engine.sampler import Sampler
from engine.speculative.costs import CostTable
from engine.speculative.draft_model import MAX_DRAFT_TOKENS, DraftModel
from engine.speculative.draft_passes import DraftForward, EagerPasses
from engine.speculative.draft_steps import DraftStep, DraftSteps
from engine.speculative.drafting import DRAFT_GROUP, USUAL_LAG
from engine.speculative.lengths import AdaptiveLengths, FixedLengths, Lengths
from engine.speculative.ngram import NgramProposer
from engine.speculative.proposer import Proposer
from engine.speculative.speculation import DraftAndVerify, NoSpeculation, Speculation
from engine.speculative.verifier import Verifier
from engine.step import factory as step_factory
from engine.step.graphs import Recorder, StepGraphs
from engine.step.inputs import StepInputs
from engine.step.shapes import StepShapes


def make_speculation(
    config: EngineConfig, model: LoadedModel, kv_cache: KvCache, sampler: Sampler, recorder: Recorder
) -> Speculation:
    """Proposer, verifier and policy of draft lengths; `model.draft` is loaded if one is asked for."""
    if config.speculative == "off":
        return NoSpeculation(sampler)
    proposer: Proposer
    if config.speculative == "ngram":
        proposer = NgramProposer()
    else:
        proposer = make_draft_model(
            config, model, kv_cache, recorder if step_factory.may_overlap(config) else None
        )
    return speculation_with(proposer, config, sampler, max_model_len=model.facts.max_model_len)


def make_draft_model(
    config: EngineConfig, model: LoadedModel, kv_cache: KvCache, recorder: Recorder | None
) -> DraftModel:
    """With passes that are recorded, or without a recorder eager ones."""
    assert model.draft is not None
    forward = DraftForward(model.draft.module, kv_cache.groups[DRAFT_GROUP], config.block_size)
    eager = EagerPasses(forward, by_rejection=config.draft_acceptance == "rejection")
    if recorder is None:
        return DraftModel(forward, eager)
    return DraftModel(forward, draft_steps(config, model.facts.max_model_len, forward, eager, recorder))


def draft_steps(
    config: EngineConfig, max_model_len: int, forward: DraftForward, eager: EagerPasses, recorder: Recorder
) -> DraftSteps:
    """A draft model's steps in all shapes, recorded."""
    shapes = draft_shapes(config)
    max_draft_tokens = config.num_draft_tokens or MAX_DRAFT_TOKENS
    inputs = StepInputs(
        max_num_seqs=shapes.max_num_seqs,
        max_num_rows=shapes.max_num_rows,
        max_model_len=max_model_len,
        block_size=forward.block_size,
        device=forward.kv_group.device,
        num_stages=max_draft_tokens,
    )
    step = DraftStep(forward.module, forward.kv_group, inputs, max_num_rows=shapes.max_num_rows)
    graphs = StepGraphs(step, shapes, recorder)
    graphs.capture()
    by_rejection = config.draft_acceptance == "rejection"
    return DraftSteps(graphs, step.drawn, eager, max_draft_tokens=max_draft_tokens, by_rejection=by_rejection)


def draft_shapes(config: EngineConfig) -> StepShapes:
    """As many queries for each request as it usually has tokens without draft KV."""
    return StepShapes(step_factory.padded_sizes(config), range(1, USUAL_LAG + 1))


def speculation_with(
    proposer: Proposer, config: EngineConfig, sampler: Sampler, *, max_model_len: int
) -> Speculation:
    """Speculation with any proposer."""
    target_costs, draft_costs = CostTable(), CostTable()
    lengths: Lengths
    if config.num_draft_tokens is None:
        most = longest_draft(config, proposer)
        lengths = AdaptiveLengths(target_costs, draft_costs, max_draft_tokens=most)
    else:
        lengths = FixedLengths(config.num_draft_tokens)
    verifier = Verifier(sampler, by_rejection=config.draft_acceptance == "rejection")
    return DraftAndVerify(
        proposer,
        verifier,
        lengths,
        target_costs=target_costs,
        draft_costs=draft_costs,
        max_model_len=max_model_len,
        now=clock_of(config.device),
    )


def longest_draft(config: EngineConfig, proposer: Proposer) -> int:
    """Where the length is chosen step by step: what is longer than captured steps has to pay for launches."""
    most = proposer.max_draft_tokens
    return min(most, step_factory.CAPTURED_DRAFT_TOKENS) if step_factory.captures(config) else most


def clock_of(device: str) -> Callable[[], float]:
    """Seconds that a pass costs: on a CPU those of this thread, whatever else the machine does meanwhile."""
    return thread_time if torch.device(device).type == "cpu" else perf_counter
