"""From a plan to the tensors of one packed forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.block_table import BlockTable
from engine.models.inputs import FinalRows
from engine.plan import Scheduled
from kernels.attention import AttentionBatch

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
    request, num_drafts = item.request, len(item.draft_token_ids)
    last = item.query_len - 1
    samples: Sequence[int] = ()
    if item.samples:
        samples = range(last, last + 1 + num_drafts) if num_drafts else [last] * len(request.samplers)
    start = request.num_computed_tokens
    scored = item.scored
    return Span(
        table=request.block_tables[0],
        start=start,
        token_ids=[*request.tokens(start, item.context_len), *item.draft_token_ids],
        num_singles=num_drafts,
        samples=samples,
        scored=range(scored.start - start, scored.stop - start),
    )


def pack(spans: Sequence[Span], *, block_size: int, device: torch.device) -> Batch:
    """Lists first, then one copy per tensor."""
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    first_rows: list[int] = []
    for span in spans:
        first_rows.append(len(token_ids))
        token_ids += span.token_ids
        of_span = range(span.start, span.start + len(span.token_ids))
        positions += of_span
        slots += [
            span.table[position // block_size] * block_size + position % block_size for position in of_span
        ]
    return Batch(
        token_ids=_padded(token_ids, device),
        positions=_padded(positions, device),
        slot_mapping=torch.tensor(slots, dtype=torch.int64, device=device),
        attention=_attention(spans, block_size, device),
        final=_final_rows(spans, first_rows, len(token_ids), block_size, device),
        num_samples=sum(len(span.samples) for span in spans),
        num_scored=sum(len(span.scored) for span in spans),
    )


def _final_rows(
    spans: Sequence[Span], first_rows: Sequence[int], num_rows: int, block_size: int, device: torch.device
) -> FinalRows | None:
    each = list(zip(spans, first_rows, strict=True))
    wanted = [(span, first, index) for span, first in each for index in span.samples]
    wanted += [(span, first, index) for span, first in each for index in span.scored]
    rows = [first + index for _, first, index in wanted]
    if rows == list(range(num_rows)):
        return None
    attention = AttentionBatch(
        query_lens=[1] * len(rows),
        context_lens=[span.start + index + 1 for span, _, index in wanted],
        block_tables=[span.table for span, _, _ in wanted],
        block_size=block_size,
        device=device,
    )
    return FinalRows(rows=_padded(rows, device), attention=attention)


def _attention(spans: Sequence[Span], block_size: int, device: torch.device) -> AttentionBatch:
    query_lens: list[int] = []
    context_lens: list[int] = []
    tables: list[Sequence[int]] = []
    for span in spans:
        end = span.start + len(span.token_ids)
        lens = [len(span.token_ids) - span.num_singles, *[1] * span.num_singles]
        query_lens += lens
        context_lens += range(end - span.num_singles, end + 1)
        tables += [span.table] * len(lens)
    return AttentionBatch(
        query_lens=query_lens,
        context_lens=context_lens,
        block_tables=tables,
        block_size=block_size,
        device=device,
    )


def _padded(values: list[int], device: torch.device) -> Tensor:
    padding = [0] * max(MIN_ROWS - len(values), 0)
    return torch.tensor(values + padding, dtype=torch.int64, device=device)
