"""How a draft model's passes are run: each one waited for, here, or in `engine.speculative.draft_steps`."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from engine.batch import Span, pack
from engine.drawing import choose
from engine.models.decoder import Decoder
from engine.speculative.drafting import Drafting
from engine.speculative.rejection import draw_draft


class DraftPasses(Protocol):
    """Draws drafts token by token, each token for all requests at once."""

    def draw(self, drafting: Sequence[Drafting]) -> None:
        """Every token that is wanted, into each draft; the KV of all of them but the last."""
        ...


class DraftForward:
    """The draft model over its KV group."""

    def __init__(self, module: Decoder, kv_group: Tensor, block_size: int) -> None:
        self.module = module
        self.kv_group = kv_group
        self.block_size = block_size

    def hidden(self, spans: Sequence[Span]) -> Tensor:
        """Final hidden states of the spans' samples, padded; all KV."""
        batch = pack(spans, block_size=self.block_size, device=self.kv_group.device)
        return self.module.forward(
            batch.token_ids, batch.positions, self.kv_group, batch.slot_mapping, batch.attention, batch.final
        )

    def logits(self, spans: Sequence[Span]) -> Tensor:
        """fp32 [len(spans), vocab_size] behind each span."""
        return self.module.logits(self.hidden(spans))[: len(spans)]


class EagerPasses:
    """Kernel by kernel; each token is on the host before the next pass begins."""

    def __init__(self, forward: DraftForward, *, by_rejection: bool) -> None:
        self._forward = forward
        self._by_rejection = by_rejection

    def draw(self, drafting: Sequence[Drafting]) -> None:
        """See DraftPasses."""
        rows: dict[Drafting, list[Tensor]] = {each: [] for each in drafting}
        active = list(drafting)
        while active:
            logits = self._forward.logits([each.span() for each in active])
            self._draw(active, logits, rows)
            active = [each for each in active if each.wants_more]
        for each, kept in rows.items():
            each.logits = torch.stack(kept) if kept else None

    def _draw(self, drafting: Sequence[Drafting], logits: Tensor, rows: dict[Drafting, list[Tensor]]) -> None:
        requests = [each.request for each in drafting]
        ahead = [len(each.token_ids) for each in drafting]
        token_ids = choose(logits, requests, ahead)
        kept: list[Tensor | None] = [None] * len(drafting)
        if self._by_rejection:
            kept = draw_draft(logits, requests, ahead, token_ids)
        for each, token_id, row in zip(drafting, token_ids.tolist(), kept, strict=True):
            each.token_ids.append(token_id)
            if row is not None:
                rows[each].append(row)
