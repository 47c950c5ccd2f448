"""Runs a plan: drafts if there are any, one packed forward pass, one pass of the sampler. No policy.

A plan of decodes alone runs as a captured step where there is one of its shape.
"""

from operator import itemgetter

import torch

from engine.batch import MIN_ROWS, build_batch, span_of
from engine.config import EngineConfig
from engine.kv_cache import KvCache
from engine.loader import LoadedModel
from engine.logprobs import record_prompt_logprobs
from engine.plan import Scheduled
from engine.sampler import Sample, Sampler
from engine.speculative.factory import make_speculation
from engine.speculative.speculation import Proposal
from engine.step.factory import make_recorder, make_steps
from engine.step.shapes import StepShape
from engine.structured import Grammars
from engine.warm_up import warm_up


class Runner:
    """The model, its KV cache and its sampler on one device."""

    def __init__(
        self, config: EngineConfig, model: LoadedModel, kv_cache: KvCache, grammars: Grammars
    ) -> None:
        self._module = model.module
        self._watch = model.watch
        self._kv_cache = kv_cache
        self.sampler = Sampler(model.facts.eos_token_ids, model.facts.vocab_size, grammars)
        warm_up(config, model, kv_cache)
        recorder = make_recorder(config)
        self._graphs, self.flights = make_steps(config, model, kv_cache, recorder)
        self.speculation = make_speculation(config, model, kv_cache, self.sampler, recorder)

    @torch.inference_mode()
    def run(self, plan: list[Scheduled]) -> list[Sample]:
        """Compute all scheduled tokens; one sample for each of `Request.samplers`, in plan order."""
        proposal = self.speculation.propose(plan)
        shape = self._graphs.shapes.fit_plan(proposal.plan) if self._graphs else None
        return self._replay(proposal, shape) if shape else self._run_eagerly(proposal)

    def check(self) -> None:
        """Assert the invariants of captured steps."""
        if self._graphs:
            self._graphs.check()

    def _replay(self, proposal: Proposal, shape: StepShape) -> list[Sample]:
        assert self._graphs is not None
        order = self._graphs.rows.arrange([item.request for item in proposal.plan])
        proposal = proposal.arranged(order)
        spans = [span_of(item) for item in proposal.plan]
        hidden, logits = self._graphs.run(shape, spans)
        self.speculation.follow(proposal.plan, hidden)
        num_rows = sum(len(span.token_ids) for span in spans)
        samples = self.speculation.sample(logits[:num_rows], proposal)
        return [sample for _, sample in sorted(zip(order, samples, strict=True), key=itemgetter(0))]

    def _run_eagerly(self, proposal: Proposal) -> list[Sample]:
        kv_group = self._kv_cache.groups[0]
        batch = build_batch(
            proposal.plan, block_size=self._kv_cache.tables.block_size, device=kv_group.device
        )
        num_samples, final = batch.num_samples, batch.final
        with self._watch.watching(proposal.plan):
            hidden = self._module.forward(
                batch.token_ids,
                batch.positions,
                kv_group,
                batch.slot_mapping,
                batch.attention,
                None if self.speculation.reads_hidden else final,
            )
        self.speculation.follow(proposal.plan, hidden)
        if final is not None and self.speculation.reads_hidden:
            hidden = hidden.index_select(0, final.rows)
        if batch.num_scored:
            scored = hidden[num_samples : num_samples + batch.num_scored]
            record_prompt_logprobs(proposal.plan, scored, self._module.logits)
        if not num_samples:
            return []
        logits = self._module.logits(hidden[: max(num_samples, MIN_ROWS)])
        return self.speculation.sample(logits[:num_samples], proposal)
