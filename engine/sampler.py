"""From logits to tokens, one vectorised pass over all rows of a step.

The order is that of transformers: processors of single logits (`logit_edits`), then temperature, truncation
and argmax with counter-based Gumbel noise (`drawing`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from engine.drawing import choose
from engine.logit_edits import edit_logits
from engine.logprobs import token_logprobs
from engine.request import Request, SamplingParams, TokenLogprob
from engine.sampler_state import SamplerState
from engine.structured import Grammars
from kernels import ops
from kernels.integers import int64s


@dataclass(slots=True)
class Sample:
    """The outcome of one row: a token, or an error."""

    token_id: int
    logprob: TokenLogprob | None = None
    error: str | None = None
    then: tuple["Sample", ...] = ()
    """What follows at once: one sample behind each draft token that was accepted, none of them an error."""
    num_draft_tokens: int = 0
    """Draft tokens that were judged with this row."""


NOT_FINITE = "the model gave logits that are not finite"
NO_TOKEN = "the sampling parameters leave no token to choose from"
ERRORS = (NOT_FINITE, NO_TOKEN)
"""By the number of usable rows: of the model's logits, then of the edited ones."""


class Sampler:
    """Chooses the next token of each request."""

    def __init__(
        self, eos_token_ids: Sequence[int], vocab_size: int, grammars: Grammars | None = None
    ) -> None:
        self._eos_token_ids = tuple(eos_token_ids)
        self._vocab_size = vocab_size
        self._grammars = grammars
        self._states: WeakKeyDictionary[Request, SamplerState] = WeakKeyDictionary()

    def sample(
        self, logits: Tensor, requests: Sequence[Request], ahead: Sequence[int] | None = None
    ) -> list[Sample]:
        """One sample per row; a row with NaN, only infinities or no token that is allowed fails alone.

        logits: fp32 [num_requests, vocab_size] of each request's last token; left as they are.
        ahead: how many tokens behind its sequence each request's row stands, if any; not for requests that
        edit logits, whose edits are those of the sequence as it is.
        """
        num_usable, usable = 1, ops.finite_best(logits)
        edited = self._edit(logits, requests)
        if edited is not logits:
            num_usable, usable = 2, usable + ops.finite_best(edited)
        token_ids = choose(edited, requests, ahead)
        logprobs = logprobs_of(logits, requests, token_ids)
        each = zip(*torch.stack((token_ids, usable)).tolist(), logprobs, strict=True)
        return [
            Sample(token_id, logprob) if row_usable == num_usable else Sample(-1, error=ERRORS[row_usable])
            for token_id, row_usable, logprob in each
        ]

    def completes(self, request: Request) -> bool:
        """The request's output matches its grammar and nothing may follow it."""
        constraint = self._state(request).constraint
        return constraint is not None and constraint.complete

    def _edit(self, logits: Tensor, requests: Sequence[Request]) -> Tensor:
        """The logits with every edit of single ones, on a copy if there is any."""
        rows = [
            (row, request, self._state(request))
            for row, request in enumerate(requests)
            if request.sampling.edits_logits
        ]
        if rows:
            logits = logits.clone(memory_format=torch.contiguous_format)
            edit_logits(logits, rows)
        return logits

    def _state(self, request: Request) -> SamplerState:
        state = self._states.get(request)
        if state is None:
            state = SamplerState(request, self._eos_token_ids, self._vocab_size, self._grammars)
            self._states[request] = state
        state.catch_up(request)
        return state


def rows_where(requests: Sequence[Request], holds: Callable[[SamplingParams], bool]) -> list[int]:
    """Indices of the requests whose parameters meet a condition."""
    return [row for row, request in enumerate(requests) if holds(request.sampling)]


def logprobs_of(logits: Tensor, requests: Sequence[Request], token_ids: Tensor) -> list[TokenLogprob | None]:
    """Log-probabilities under the untouched logits for the requests that ask for them."""
    found: list[TokenLogprob | None] = [None] * len(requests)
    rows = rows_where(requests, lambda params: params.logprobs is not None)
    if not rows:
        return found
    index = int64s(rows, logits.device)
    num_top = [requests[row].sampling.logprobs or 0 for row in rows]
    asked = token_logprobs(logits.index_select(0, index), token_ids.index_select(0, index), num_top)
    for row, logprob in zip(rows, asked, strict=True):
        found[row] = logprob
    return found
