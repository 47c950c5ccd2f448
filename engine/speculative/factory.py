"""The speculation that an engine's config asks for."""

from collections.abc import Callable
from time import perf_counter, thread_time

import torch

from engine.config import EngineConfig
from engine.kv_cache import KvCache
from engine.loader import LoadedModel
from engine.sampler import Sampler
from engine.speculative.costs import CostTable
from engine.speculative.draft_model import DraftModel
from engine.speculative.lengths import AdaptiveLengths, FixedLengths, Lengths
from engine.speculative.ngram import NgramProposer
from engine.speculative.proposer import Proposer
from engine.speculative.speculation import DraftAndVerify, NoSpeculation, Speculation
from engine.speculative.verifier import Verifier


def make_speculation(
    config: EngineConfig, model: LoadedModel, kv_cache: KvCache, sampler: Sampler
) -> Speculation:
    """Proposer, verifier and policy of draft lengths; `model.draft` is loaded if one is asked for."""
    if config.speculative == "off":
        return NoSpeculation(sampler)
    by_rejection = config.draft_acceptance == "rejection"
    if config.speculative == "ngram":
        proposer: Proposer = NgramProposer()
    else:
        assert model.draft is not None
        proposer = DraftModel(model.draft.module, kv_cache, by_rejection=by_rejection)
    return speculation_with(proposer, config, sampler, max_model_len=model.facts.max_model_len)


def speculation_with(
    proposer: Proposer, config: EngineConfig, sampler: Sampler, *, max_model_len: int
) -> Speculation:
    """Speculation with any proposer."""
    target_costs, draft_costs = CostTable(), CostTable()
    lengths: Lengths
    if config.num_draft_tokens is None:
        lengths = AdaptiveLengths(target_costs, draft_costs, max_draft_tokens=proposer.max_draft_tokens)
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


def clock_of(device: str) -> Callable[[], float]:
    """Seconds that a pass costs: on a CPU those of this thread, whatever else the machine does meanwhile."""
    return thread_time if torch.device(device).type == "cpu" else perf_counter
