"""What the scheduler decides for one step: integers and lists, no tensors."""

from dataclasses import dataclass

from engine.request import Request


@dataclass(frozen=True, slots=True)
class Scheduled:
    """One request's part of a step: its next `query_len` tokens are computed."""

    request: Request
    query_len: int

    @property
    def context_len(self) -> int:
        """Computed tokens of the request after the step."""
        return self.request.num_computed_tokens + self.query_len

    @property
    def samples(self) -> bool:
        """The step reaches the end of the sequence: the next token is sampled."""
        return self.context_len == self.request.num_tokens
