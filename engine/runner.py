"""Runs a plan: one packed forward pass and one pass of the sampler. No policy."""

from collections.abc import Sequence

import torch

from engine.batch import build_batch
from engine.kv_cache import KvCache
from engine.loader import LoadedModel
from engine.logprobs import record_prompt_logprobs
from engine.plan import Scheduled
from engine.sampler import Sample, Sampler
from engine.structured import Grammars


class Runner:
    """The model, its KV cache and its sampler on one device."""

    def __init__(self, model: LoadedModel, kv_cache: KvCache, grammars: Grammars) -> None:
        self._module = model.module
        self._kv_cache = kv_cache
        self.sampler = Sampler(model.facts.eos_token_ids, model.facts.vocab_size, grammars)

    @torch.inference_mode()
    def run(self, plan: Sequence[Scheduled]) -> list[Sample]:
        """Compute all scheduled tokens; one sample for each of `Request.samplers`, in plan order."""
        kv_group = self._kv_cache.groups[0]
        batch = build_batch(plan, block_size=self._kv_cache.tables.block_size, device=kv_group.device)
        group = batch.groups[0]
        hidden = self._module.forward(
            batch.token_ids, batch.positions, kv_group, group.slot_mapping, group.attention
        )
        record_prompt_logprobs(plan, hidden, self._module.logits)
        requests = [sampler for item in plan if item.samples for sampler in item.request.samplers]
        if not requests:
            return []
        logits = self._module.logits(hidden.index_select(0, batch.sample_rows))
        return self.sampler.sample(logits[: batch.num_samples], requests)
