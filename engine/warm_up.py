"""Steps that a GPU runs before there are requests: one of each kind that kernels are compiled apart for.

Triton compiles a kernel when it is first launched with new compile-time arguments; that takes seconds, in
which nobody is served. So what a kernel is compiled for may depend on what is gone through here alone: sizes
of batches and contexts are run-time arguments or rounded to powers of two.
"""

import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from engine.batch import Span, pack
from engine.block_table import BlockTable
from engine.config import EngineConfig
from engine.drawing import Draw, draw_fused
from engine.kv_cache import KvCache
from engine.kv_pool import LocalKvPool
from engine.loader import LoadedModel
from engine.request import SamplingParams
from kernels import ops
from kernels.paged_batch import FEW_QUERIES
from runtime.clock import SystemClock

logger = logging.getLogger(__name__)

SHORTEST_CONTEXT = 256
"""Attention does not cut shorter ones; it cuts into powers of two."""

VERIFIED_DRAFT_TOKENS = 8
"""Of a request, as far as its verification is gone through."""

TRUNCATED = SamplingParams(max_tokens=1, top_k=2, top_p=0.5)
UNTRUNCATED = SamplingParams(max_tokens=1, typical_p=0.5)
"""As far as kernels know: what truncates here is torch."""


@torch.inference_mode()
def warm_up(config: EngineConfig, model: LoadedModel, kv_cache: KvCache) -> None:
    """Run them if the engine's device is a GPU. What the pool's first block holds is lost."""
    if torch.device(config.device).type != "cuda":
        return
    clock = SystemClock()
    start = clock.now()
    for part, kv_group in zip((model, model.draft), kv_cache.groups, strict=False):
        assert part is not None
        _compute(config, part, kv_group)
    _copy(kv_cache.pool.local)
    _draw(model.facts.vocab_size, kv_cache.groups[0].device, 1, UNTRUNCATED)
    for num_rows in _orders(config.max_num_seqs):
        _draw(model.facts.vocab_size, kv_cache.groups[0].device, num_rows, TRUNCATED)
        if config.speculative != "off" and config.draft_acceptance == "rejection":
            _verify(model.facts.vocab_size, kv_cache.groups[0].device, num_rows)
    logger.info("warmed up in %.1f s", clock.now() - start)


def _compute(config: EngineConfig, model: LoadedModel, kv_group: Tensor) -> None:
    for spans in _batches(config.max_num_batched_tokens, model.facts.max_model_len, config.block_size):
        batch = pack(spans, block_size=config.block_size, device=kv_group.device)
        module = model.module
        module.forward(
            batch.token_ids, batch.positions, kv_group, batch.slot_mapping, batch.attention, batch.final
        )


def _batches(budget: int, max_model_len: int, block_size: int) -> Iterator[list[Span]]:
    """One query, or a few, behind contexts of each order of length; many queries, alone and beside one."""

    def span(context_len: int, query_len: int) -> Span:
        table = BlockTable([0] * -(-context_len // block_size))
        tokens = [0] * query_len
        return Span(table=table, start=context_len - query_len, token_ids=tokens, samples=(query_len - 1,))

    context_len = min(SHORTEST_CONTEXT, max_model_len)
    while context_len <= max_model_len:
        yield [span(context_len, 1)]
        if min(budget, context_len) > 1:
            yield [span(context_len, 2)]
        context_len = max_model_len if context_len < max_model_len <= 2 * context_len else 2 * context_len
    many = min(budget - 1, max_model_len)
    if many > FEW_QUERIES:
        yield [span(many, many)]
        yield [span(many, many), span(1, 1)]


def _copy(pool: LocalKvPool) -> None:
    """Blocks to slabs and back, as links and swaps move them."""
    for number, group in enumerate(pool.groups):
        slab = torch.empty(2 * len(group) * group[0, 0, 0].nbytes, dtype=torch.uint8, device=group.device)
        pool.gather(number, [0], 0, len(group), slab)
        pool.scatter(number, [0], 0, len(group), slab)
        ops.gather_blocks(group, [0], 0, len(group), slab)
        ops.scatter_blocks(group, [0], 0, len(group), slab)


def _orders(most: int) -> Iterator[int]:
    """1, 2, 4, … up to the first that is no less."""
    number = 1
    while number < 2 * most:
        yield number
        number *= 2


def _draw(vocab_size: int, device: torch.device, num_rows: int, params: SamplingParams) -> None:
    logits = torch.zeros(num_rows, vocab_size, device=device)
    draw_fused(logits, [Draw(params, 0, 0)] * num_rows)


def _verify(vocab_size: int, device: torch.device, num_requests: int) -> None:
    """Drafts of one token, of few requests also of as many as they are; with and without own logits."""
    for num_drafts in {1, num_requests if num_requests <= VERIFIED_DRAFT_TOKENS else 1}:
        draft_ids = torch.zeros(num_requests, num_drafts, dtype=torch.int64, device=device)
        keys = torch.zeros(num_requests, dtype=torch.int64, device=device)
        target = torch.zeros(num_requests * (num_drafts + 1), vocab_size, device=device)
        for draft in (None, target[: num_requests * num_drafts]):
            ops.rejection_verify(target, draft, draft_ids, keys, keys, keys)
