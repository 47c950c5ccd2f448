"""Drafts from a small model that shares the target's vocabulary.

It runs over the same sequences and keeps its KV in a group of its own, at the same places of the same block
tables. Where the target computes a prompt, the draft follows over the same tokens; where KV comes from
outside, the draft's comes with it. `Request.num_draft_computed_tokens` says how much there is: what is
missing, because nobody drafted for a while, is caught up when a draft is asked for.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.batch import Span, pack
from engine.drawing import choose
from engine.kv_cache import KvCache
from engine.models.decoder import Decoder
from engine.plan import Scheduled
from engine.request import Request, RequestState
from engine.speculative.proposer import NO_DRAFT, Draft
from engine.speculative.rejection import draw_draft

DRAFT_GROUP = 1
"""The draft's KV group; the target's is 0."""

MAX_CATCH_UP_TOKENS = 256
"""Of a step, all requests together; who lags further behind gets its draft in a later step."""

USUAL_LAG = 2
"""Tokens without draft KV after a step that drafted: the last, and the last draft token if it was kept."""

MAX_SINGLES = 4
"""Spans up to this length are computed as decode rows, which is cheaper than a prefill span each."""


class DraftModel:
    """A proposer that runs a second model, token by token, over all requests at once."""

    max_draft_tokens = 8
    reads_hidden = False

    def __init__(self, module: Decoder, kv_cache: KvCache, *, by_rejection: bool) -> None:
        self._module = module
        self._kv_group = kv_cache.groups[DRAFT_GROUP]
        self._block_size = kv_cache.tables.block_size
        self._by_rejection = by_rejection

    def propose(self, plan: Sequence[Scheduled]) -> list[Draft]:
        """Draw with the target's noise, or with noise of its own where verification is by rejection."""
        drafting = [Drafting(item) for item in self._caught_up(plan)]
        found = {each.request: each for each in drafting}
        while drafting:
            logits = self._run([each.span() for each in drafting])
            self._draw(drafting, logits)
            drafting = [each for each in drafting if each.wants_more]
        return [found[item.request].draft() if item.request in found else NO_DRAFT for item in plan]

    def follow(self, plan: Sequence[Scheduled], hidden: Tensor) -> None:
        """Compute the same prompt tokens as the target; a decoding request waits until it drafts."""
        spans = []
        for item in plan:
            request, end = item.request, item.context_len
            if request.state is RequestState.PREFILLING:
                start = request.num_draft_computed_tokens
                spans.append(_span(request, start, request.tokens(start, end)))
                request.num_draft_computed_tokens = end
        if spans:
            self._forward(spans)

    def rewind(self, request: Request, num_accepted: int) -> None:
        """The KV of draft tokens that were not accepted is overwritten by the next draft."""
        end = request.num_tokens + num_accepted
        request.num_draft_computed_tokens = min(request.num_draft_computed_tokens, end)

    def _caught_up(self, plan: Sequence[Scheduled]) -> list[Scheduled]:
        """Who drafts in this step; some of those that lag too far behind are brought nearer instead."""
        ready: list[Scheduled] = []
        behind: list[Span] = []
        budget = MAX_CATCH_UP_TOKENS
        for item in plan:
            request, start = item.request, item.request.num_draft_computed_tokens
            lag = request.num_tokens - start
            if not item.num_draft_tokens:
                continue
            if lag <= max(budget, USUAL_LAG):
                ready.append(item)
            elif budget > 0:
                behind.append(_span(request, start, request.tokens(start, start + budget)))
                request.num_draft_computed_tokens += budget
            budget -= max(lag - USUAL_LAG, 0)
        if behind:
            self._forward(behind)
        return ready

    def _draw(self, drafting: Sequence["Drafting"], logits: Tensor) -> None:
        requests = [each.request for each in drafting]
        ahead = [len(each.token_ids) for each in drafting]
        token_ids = choose(logits, requests, ahead)
        kept: list[Tensor | None] = [None] * len(drafting)
        if self._by_rejection:
            kept = draw_draft(logits, requests, ahead, token_ids)
        for each, token_id, row in zip(drafting, token_ids.tolist(), kept, strict=True):
            each.token_ids.append(token_id)
            if row is not None:
                each.rows.append(row)

    def _run(self, spans: Sequence[Span]) -> Tensor:
        """Logits [len(spans), vocab_size] behind each span."""
        return self._module.logits(self._forward(spans))[: len(spans)]

    def _forward(self, spans: Sequence[Span]) -> Tensor:
        """Final hidden states of the spans' samples, padded; all KV."""
        batch = pack(spans, block_size=self._block_size, device=self._kv_group.device)
        return self._module.forward(
            batch.token_ids, batch.positions, self._kv_group, batch.slot_mapping, batch.attention, batch.final
        )


class Drafting:
    """One request's draft while it grows."""

    def __init__(self, item: Scheduled) -> None:
        self.request = item.request
        self.token_ids: list[int] = []
        self.rows: list[Tensor] = []
        self._wanted = item.num_draft_tokens

    @property
    def wants_more(self) -> bool:
        """Not all tokens that were asked for are drawn."""
        return len(self.token_ids) < self._wanted

    def span(self) -> Span:
        """All tokens without draft KV; the next draft token follows the last of them."""
        request = self.request
        start = request.num_draft_computed_tokens
        num_tokens = request.num_tokens
        tokens = request.tokens(start, num_tokens) if start < num_tokens else []
        tokens += self.token_ids[max(start - num_tokens, 0) :]
        request.num_draft_computed_tokens = start + len(tokens)
        return _span(request, start, tokens)

    def draft(self) -> Draft:
        """What was drawn."""
        return Draft(tuple(self.token_ids), torch.stack(self.rows) if self.rows else None)


def _span(request: Request, start: int, token_ids: list[int]) -> Span:
    length = len(token_ids)
    return Span(
        table=request.block_tables[DRAFT_GROUP],
        start=start,
        token_ids=token_ids,
        num_singles=length - 1 if length <= MAX_SINGLES else 0,
        samples=(length - 1,),
    )
