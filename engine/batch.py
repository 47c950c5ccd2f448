"""From a plan to the tensors of one packed forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.plan import Scheduled
from kernels.attention import AttentionBatch

MIN_ROWS = 4
"""torch's fp32 linear gives the same bits for a row in any batch of at least this many rows, and others
below (measured on CPU): all batches are padded to it."""


@dataclass(frozen=True, kw_only=True)
class GroupBatch:
    """A step's view of one KV group."""

    slot_mapping: Tensor
    """int64 [num_tokens]: the slot of each new token; padding rows have none."""
    attention: AttentionBatch


@dataclass(frozen=True, kw_only=True)
class Batch:
    """New tokens of all scheduled requests, packed, then padded to MIN_ROWS rows."""

    token_ids: Tensor
    """int64 [num_rows]."""
    positions: Tensor
    """int64 [num_rows]."""
    groups: list[GroupBatch]
    """One per KV group."""
    sample_rows: Tensor
    """int64 [max(num_samples, MIN_ROWS)]: last row of a sequence, for each request that samples
    from it; padding is row 0."""
    num_samples: int


def build_batch(plan: Sequence[Scheduled], *, block_size: int, device: torch.device) -> Batch:
    """Pack a plan that is not empty; lists first, then one copy per tensor."""
    token_ids: list[int] = []
    positions: list[int] = []
    sample_rows: list[int] = []
    for item in plan:
        start = item.request.num_computed_tokens
        token_ids += item.request.tokens(start, item.context_len)
        positions += range(start, item.context_len)
        if item.samples:
            sample_rows += [len(token_ids) - 1] * len(item.request.samplers)
    num_groups = len(plan[0].request.block_tables)
    return Batch(
        token_ids=_padded(token_ids, device),
        positions=_padded(positions, device),
        groups=[_group_batch(plan, group, block_size, device) for group in range(num_groups)],
        sample_rows=_padded(sample_rows, device),
        num_samples=len(sample_rows),
    )


def _group_batch(plan: Sequence[Scheduled], group: int, block_size: int, device: torch.device) -> GroupBatch:
    tables = [item.request.block_tables[group] for item in plan]
    slots: list[int] = []
    for item, table in zip(plan, tables, strict=True):
        positions = range(item.request.num_computed_tokens, item.context_len)
        slots += [
            table[position // block_size] * block_size + position % block_size for position in positions
        ]
    return GroupBatch(
        slot_mapping=torch.tensor(slots, dtype=torch.int64, device=device),
        attention=AttentionBatch(
            query_lens=[item.query_len for item in plan],
            context_lens=[item.context_len for item in plan],
            block_tables=tables,
            block_size=block_size,
            device=device,
        ),
    )


def _padded(values: list[int], device: torch.device) -> Tensor:
    padding = [0] * max(MIN_ROWS - len(values), 0)
    return torch.tensor(values + padding, dtype=torch.int64, device=device)
