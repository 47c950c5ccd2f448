"""From a plan to the tensors of one packed forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain

import torch
from torch import Tensor

from engine.block_table import BlockTable
from engine.models.inputs import FinalRows
from engine.plan import Scheduled
from kernels.attention import AttentionBatch
from kernels.integers import int64s

MIN_ROWS = 4
"""torch's fp32 linear gives the same bits for a row in any batch of at least this many rows, and others
below (measured on CPU): all batches are padded to it."""


@dataclass(kw_only=True, slots=True)
class Span:
    """Consecutive new tokens of one request."""

    table: BlockTable
    """In the KV group of the model that runs."""
    start: int
    """Position of the first new token."""
    token_ids: list[int]
    num_singles: int = 0
    """So many tokens at the end are each computed like the one token of a decode step: the same bits."""
    samples: Sequence[int] = field(default=())
    """Tokens behind which something is sampled, counted within the span; one may be named more than once."""
    scored: Sequence[int] = field(default=())
    """Tokens whose logits are wanted for the prompt's log-probabilities, counted within the span."""

    @property
    def end(self) -> int:
        """Length of the context of the last new token."""
        return self.start + len(self.token_ids)

    @property
    def positions(self) -> range:
        """Of the new tokens."""
        return range(self.start, self.start + len(self.token_ids))


Wanted = tuple[int, Span, int]
"""A row of a packed batch, its span, and its place within that."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """New tokens of all spans, packed, then padded to MIN_ROWS rows."""

    token_ids: Tensor
    """int64 [num_rows]."""
    positions: Tensor
    """int64 [num_rows]."""
    slot_mapping: Tensor
    """int64 [num_tokens]: the slot of each new token; padding rows have none."""
    attention: AttentionBatch
    final: FinalRows | None
    """Rows whose logits are wanted: first those of all samples, then all that are scored, padded to MIN_ROWS;
    None if that is every row, in order."""
    num_samples: int
    num_scored: int


def build_batch(plan: Sequence[Scheduled], *, block_size: int, device: torch.device) -> Batch:
    """Pack a plan that is not empty for the target model."""
    return pack([span_of(item) for item in plan], block_size=block_size, device=device)


def span_of(item: Scheduled) -> Span:
    """What is computed of the sequence, then the draft tokens, each sampled behind; for the target model."""
    request, start = item.request, item.request.num_computed_tokens
    span = Span(
        table=request.block_tables[0],
        start=start,
        token_ids=request.tokens(start, start + item.query_len),
        samples=[item.query_len - 1] * len(request.samplers) if item.samples else (),
    )
    if item.draft_token_ids:
        span.token_ids += item.draft_token_ids
        span.num_singles = len(item.draft_token_ids)
        span.samples = range(item.query_len - 1, len(span.token_ids))
    if request.prompt_logprobs is not None:
        scored = item.scored
        span.scored = range(scored.start - start, scored.stop - start)
    return span


def pack(spans: Sequence[Span], *, block_size: int, device: torch.device) -> Batch:
    """Lists first, then one copy."""
    token_ids = list(chain.from_iterable([span.token_ids for span in spans]))
    places = [(span.table, position) for span in spans for position in span.positions]
    positions = [position for _, position in places]
    rows = [_padded(values) for values in (token_ids, positions, slots(places, block_size))]
    tensors = int64s(rows, device).unbind()
    samples, scored = _wanted(spans)
    return Batch(
        token_ids=tensors[0],
        positions=tensors[1],
        slot_mapping=tensors[2][: len(places)],
        attention=_attention(spans, block_size, device),
        final=_final_rows(samples + scored, len(token_ids), block_size, device),
        num_samples=len(samples),
        num_scored=len(scored),
    )


def slots(places: Sequence[tuple[BlockTable, int]], block_size: int) -> list[int]:
    """Where each of these positions of sequences with these tables lies in the KV cache."""
    return [table[position // block_size] * block_size + position % block_size for table, position in places]


def _wanted(spans: Sequence[Span]) -> tuple[list[Wanted], list[Wanted]]:
    """Whose logits are wanted: (of all samples, of all that is scored)."""
    each = list(zip(spans, accumulate([len(span.token_ids) for span in spans], initial=0), strict=False))
    samples = [(first + index, span, index) for span, first in each for index in span.samples]
    return samples, [(first + index, span, index) for span, first in each for index in span.scored]


def _final_rows(
    wanted: Sequence[Wanted], num_rows: int, block_size: int, device: torch.device
) -> FinalRows | None:
    rows = [row for row, _, _ in wanted]
    if rows == list(range(num_rows)):
        return None
    attention = AttentionBatch(
        query_lens=[1] * len(rows),
        context_lens=[span.start + index + 1 for _, span, index in wanted],
        block_tables=[span.table for _, span, _ in wanted],
        block_size=block_size,
        device=device,
    )
    return FinalRows(rows=int64s(_padded(rows), device), attention=attention)


def _attention(spans: Sequence[Span], block_size: int, device: torch.device) -> AttentionBatch:
    query_lens: list[int] = []
    context_lens: list[int] = []
    tables: list[Sequence[int]] = []
    for span in spans:
        query_len = len(span.token_ids) - span.num_singles
        query_lens.append(query_len)
        context_lens.append(span.start + query_len)
        tables.append(span.table)
        if span.num_singles:
            query_lens += [1] * span.num_singles
            context_lens += range(context_lens[-1] + 1, context_lens[-1] + 1 + span.num_singles)
            tables += [span.table] * span.num_singles
    return AttentionBatch(
        query_lens=query_lens,
        context_lens=context_lens,
        block_tables=tables,
        block_size=block_size,
        device=device,
    )


def _padded(values: list[int]) -> list[int]:
    return values + [0] * (MIN_ROWS - len(values))
