"""What the scheduler decides for one step: integers and lists, no tensors."""

from dataclasses import dataclass

from engine.request import Request


@dataclass(frozen=True, slots=True)
class Scheduled:
    """One request's part of a step: its next `query_len` tokens are computed."""

    request: Request
    query_len: int
    num_draft_tokens: int = 0
    """Slots that are allocated behind the sequence for tokens that are drafted and verified."""
    draft_token_ids: tuple[int, ...] = ()
    """At most that many; filled in by the proposer when the step runs."""

    @property
    def context_len(self) -> int:
        """Computed tokens of the request after the step, draft tokens apart."""
        return self.request.num_computed_tokens + self.query_len

    @property
    def num_rows(self) -> int:
        """Rows of the packed batch: new tokens of the sequence, then draft tokens."""
        return self.query_len + len(self.draft_token_ids)

    @property
    def samples(self) -> bool:
        """The step reaches the end of the sequence: the next token is sampled."""
        return self.context_len == self.request.num_tokens
