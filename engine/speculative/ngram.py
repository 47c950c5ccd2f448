"""Drafts from the sequence itself: what followed the last time that its latest tokens occurred.

Prompt lookup decoding (Saxena 2023; Yang et al. 2023, arXiv 2304.04487): no second model, and strong where
text repeats, as in editing, summarising and code.
"""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

from torch import Tensor

from engine.plan import Scheduled
from engine.request import Request
from engine.speculative.proposer import NO_DRAFT, Draft

LENGTHS = (4, 3, 2)
"""Of the latest tokens that are looked up, the longest first."""


class NgramIndex:
    """Where in one sequence each run of LENGTHS tokens occurred last; constant work per token."""

    def __init__(self) -> None:
        self._num_tokens = 0
        self._ends: dict[tuple[int, ...], int] = {}
        self._match: int | None = None

    def catch_up(self, tokens: Sequence[int], num_tokens: int) -> None:
        """Take in what is new; `tokens` are the last tokens of the sequence, enough for that and a run."""
        offset = num_tokens - len(tokens)
        for end in range(self._num_tokens + 1, num_tokens + 1):
            self._match = None
            for length in LENGTHS:
                if end < length:
                    continue
                run = tuple(tokens[end - offset - length : end - offset])
                if self._match is None:
                    self._match = self._ends.get(run)
                self._ends[run] = end
        self._num_tokens = num_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens that were taken in."""
        return self._num_tokens

    @property
    def match(self) -> int | None:
        """Length of the prefix that ends as the sequence does, by the longest run, then the latest."""
        return self._match


class NgramProposer:
    """Prompt lookup for every request; deterministic, so nothing of it moves with a request."""

    max_draft_tokens = 8
    reads_hidden = False

    def __init__(self) -> None:
        self._indices: WeakKeyDictionary[Request, NgramIndex] = WeakKeyDictionary()

    def propose(self, plan: Sequence[Scheduled]) -> list[Draft]:
        """What followed the last occurrence, repeated if it is shorter than asked for."""
        return [self._propose(item) if item.num_draft_tokens else NO_DRAFT for item in plan]

    def follow(self, plan: Sequence[Scheduled], hidden: Tensor) -> None:
        """The index is built when a draft is asked for."""

    def rewind(self, request: Request, num_accepted: int) -> None:
        """Nothing was kept."""

    def _propose(self, item: Scheduled) -> Draft:
        request = item.request
        index = self._indices.get(request)
        if index is None:
            index = self._indices[request] = NgramIndex()
        num_tokens = request.num_tokens
        oldest = max(index.num_tokens - max(LENGTHS), 0)
        index.catch_up(request.tokens(oldest, num_tokens), num_tokens)
        if index.match is None:
            return NO_DRAFT
        followed = request.tokens(index.match, min(index.match + item.num_draft_tokens, num_tokens))
        token_ids = [followed[i % len(followed)] for i in range(item.num_draft_tokens)]
        return Draft(tuple(token_ids))
