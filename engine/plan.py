"""What the scheduler decides for one step: integers and lists, no tensors."""

from dataclasses import dataclass

from engine.request import Request

NOTHING = range(0)


@dataclass(slots=True)
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
        request = self.request
        return request.num_computed_tokens + self.query_len == request.num_tokens

    @property
    def scored(self) -> range:
        """Positions of the step whose logits give the log-probability of the prompt's next token.

        Entry i of `Request.prompt_logprobs` comes from position i; positions computed again are left out.
        """
        request = self.request
        if request.prompt_logprobs is None:
            return NOTHING
        start = request.num_computed_tokens
        num_done, end = len(request.prompt_logprobs), len(request.prompt_token_ids) - 1
        assert start <= num_done or start >= end, "positions were left out"
        return range(num_done, min(self.context_len, end))
