"""Drafts from a small model that shares the target's vocabulary.

It runs over the same sequences and keeps its KV in a group of its own, at the same places of the same block
tables. Where the target computes a prompt, the draft follows over the same tokens; where KV comes from
outside, the draft's comes with it. `Request.num_draft_computed_tokens` says how much there is: what is
missing, because nobody drafted for a while, is caught up when a draft is asked for.
"""

from collections.abc import Sequence

from torch import Tensor

from engine.batch import Span
from engine.plan import Scheduled
from engine.request import Request, RequestState
from engine.speculative.draft_passes import DraftForward, DraftPasses
from engine.speculative.drafting import USUAL_LAG, Drafting, draft_span
from engine.speculative.proposer import NO_DRAFT, Draft

MAX_CATCH_UP_TOKENS = 256
"""Of a step, all requests together; who lags further behind gets its draft in a later step."""

MAX_DRAFT_TOKENS = 8
"""Unless the operator names a number."""


class DraftModel:
    """A proposer that runs a second model, token by token, over all requests at once."""

    max_draft_tokens = MAX_DRAFT_TOKENS
    reads_hidden = False

    def __init__(self, forward: DraftForward, passes: DraftPasses) -> None:
        self._forward = forward
        self._passes = passes

    def propose(self, plan: Sequence[Scheduled]) -> list[Draft]:
        """Draw with the target's noise, or with noise of its own where verification is by rejection."""
        drafting = {item.request: Drafting(item) for item in self._caught_up(plan)}
        if drafting:
            self._passes.draw([*drafting.values()])
        return [drafting[item.request].draft() if item.request in drafting else NO_DRAFT for item in plan]

    def follow(self, plan: Sequence[Scheduled], hidden: Tensor) -> None:
        """Compute the same prompt tokens as the target; a decoding request waits until it drafts."""
        spans = []
        for item in plan:
            request, end = item.request, item.context_len
            if request.state is RequestState.PREFILLING:
                spans.append(_advance(request, end - request.num_draft_computed_tokens))
        if spans:
            self._forward.hidden(spans)

    def rewind(self, request: Request, num_accepted: int) -> None:
        """The KV of draft tokens that were not accepted is overwritten by the next draft."""
        end = request.num_tokens + num_accepted
        request.num_draft_computed_tokens = min(request.num_draft_computed_tokens, end)

    def _caught_up(self, plan: Sequence[Scheduled]) -> list[Scheduled]:
        """Who drafts in this step: whoever lags at most USUAL_LAG behind, or is brought that near now."""
        ready: list[Scheduled] = []
        behind: list[Span] = []
        budget = MAX_CATCH_UP_TOKENS
        for item in plan:
            lag = item.request.num_tokens - item.request.num_draft_computed_tokens
            if not item.num_draft_tokens:
                continue
            if lag > USUAL_LAG and budget > 0:
                num = min(lag - 1, budget)
                behind.append(_advance(item.request, num))
                budget -= num
                lag -= num
            if lag <= USUAL_LAG:
                ready.append(item)
        if behind:
            self._forward.hidden(behind)
        return ready


def _advance(request: Request, num_tokens: int) -> Span:
    """The request's next tokens without draft KV, which are computed now."""
    start = request.num_draft_computed_tokens
    request.num_draft_computed_tokens = end = start + num_tokens
    return draft_span(request, start, request.tokens(start, end))
