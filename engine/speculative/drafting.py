"""A request's draft while it grows, token by token."""

from torch import Tensor

from engine.batch import Span
from engine.plan import Scheduled
from engine.request import Request
from engine.speculative.proposer import Draft

DRAFT_GROUP = 1
"""The draft model's KV group; the target's is 0."""

MAX_SINGLES = 4
"""Spans up to this length are computed as decode rows, which is cheaper than a prefill span each."""

USUAL_LAG = 2
"""Tokens without draft KV after a step that drafted: the last, and the last draft token if it was kept."""


class Drafting:
    """One request's draft; whoever computes a span appends the token behind it."""

    def __init__(self, item: Scheduled) -> None:
        self.request = item.request
        self.num_wanted = item.num_draft_tokens
        self.token_ids: list[int] = []
        self.logits: Tensor | None = None
        """See Draft."""

    @property
    def wants_more(self) -> bool:
        """Not all tokens that were asked for are there."""
        return len(self.token_ids) < self.num_wanted

    def span(self) -> Span:
        """All tokens without draft KV, at most USUAL_LAG; the next draft token follows the last of them."""
        request = self.request
        start, end = request.num_draft_computed_tokens, request.num_tokens
        tokens = request.tokens(start, end) if start < end else []
        tokens += self.token_ids[max(start - end, 0) :]
        request.num_draft_computed_tokens = start + len(tokens)
        return draft_span(request, start, tokens)

    def draft(self) -> Draft:
        """What was drawn."""
        return Draft(tuple(self.token_ids), self.logits)


def draft_span(request: Request, start: int, token_ids: list[int]) -> Span:
    """Consecutive tokens for the draft model, the last of them sampled."""
    length = len(token_ids)
    return Span(
        table=request.block_tables[DRAFT_GROUP],
        start=start,
        token_ids=token_ids,
        num_singles=length - 1 if length <= MAX_SINGLES else 0,
        samples=(length - 1,),
    )
