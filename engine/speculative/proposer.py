"""What yields draft tokens, whatever it is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from engine.plan import Scheduled
from engine.request import Request


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens that may follow a sequence."""

    token_ids: tuple[int, ...] = ()
    """At most as many as were asked for."""
    logits: Tensor | None = None
    """fp32 [len(token_ids), vocab_size]: what each token was drawn from; None: nothing was drawn."""


NO_DRAFT = Draft()


class Proposer(Protocol):
    """Guesses how sequences go on; a wrong guess costs time and nothing else."""

    @property
    def max_draft_tokens(self) -> int:
        """More are not worth asking for."""
        ...

    @property
    def reads_hidden(self) -> bool:
        """`follow` needs the target's final hidden states, of all rows."""
        ...

    def propose(self, plan: Sequence[Scheduled]) -> list[Draft]:
        """A draft behind each request's sequence, of up to its `num_draft_tokens` tokens."""
        ...

    def follow(self, plan: Sequence[Scheduled], hidden: Tensor) -> None:
        """The target has computed a plan.

        hidden: [num_rows, hidden_size], its packed final hidden states if `reads_hidden`, else some of them.
        """
        ...

    def rewind(self, request: Request, num_accepted: int) -> None:
        """Of the draft behind this request's sequence, the first `num_accepted` tokens are kept."""
        ...
