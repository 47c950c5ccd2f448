"""What a prefill worker still owes one transfer: which computed blocks may travel next."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvtransfer.messages import FirstToken
from prefill_svc.written import NOTHING, Stretch, Written, stretches
from worker.attach import AttemptKey


@dataclass(slots=True, kw_only=True, eq=False)
class Export:
    """The sending side of one attempt; owned by the event loop.

    What may travel is what is written and was not yet taken. A step that fails in its middle may leave layers
    that were taken without the rest of their blocks: first tokens come with its end alone, and only they
    lead to a commit.
    """

    key: AttemptKey
    transfer_id: bytes
    num_tokens: int
    """Tokens whose KV travels: the prompt and what earlier attempts emitted."""
    block_size: int
    block_tables: tuple[tuple[int, ...], ...] = ()
    """Per KV group the blocks of the sequence so far; replaced, never changed: a pump may be reading it."""
    written: Written = NOTHING
    taken: Written = NOTHING
    continued: tuple[FirstToken, ...] = ()
    """Of choices that earlier attempts began."""
    first_tokens: tuple[FirstToken, ...] | None = None
    """Of all choices, once they are known."""
    cached_tokens: int = 0
    committing: bool = False
    granted: bool = False
    """The receiver has reserved."""

    @property
    def total_blocks(self) -> int:
        """Blocks of the whole sequence; the last one may be partly filled."""
        return -(-self.num_tokens // self.block_size)

    @property
    def has_taken(self) -> bool:
        """Something may have left."""
        return max(self.taken.blocks, self.taken.ahead) > 0

    def advance(self, block_tables: tuple[tuple[int, ...], ...], num_computed_tokens: int) -> None:
        """A step has ended: so many tokens are computed, in all groups."""
        self.written = Written(self._num_done(num_computed_tokens))
        self.block_tables = block_tables

    def advance_layers(
        self, block_tables: tuple[tuple[int, ...], ...], num_computed_tokens: int, num_layers: int
    ) -> None:
        """A step that runs has computed so many tokens, in the target's first `num_layers` layers."""
        self.written = Written(self.written.blocks, self._num_done(num_computed_tokens), num_layers)
        self.block_tables = block_tables

    def _num_done(self, num_tokens: int) -> int:
        """Blocks that so many tokens complete: a block is done when it is full, or the sequence's last."""
        return self.total_blocks if num_tokens == self.num_tokens else num_tokens // self.block_size

    def take(self, num_layers: Sequence[int]) -> list[Stretch]:
        """What may travel now, of KV groups with so many layers; each cell is given out once."""
        before, self.taken = self.taken, self.written
        return stretches(before, self.taken, num_layers)

    def check(self) -> None:
        """Assert the invariants."""
        assert 0 <= self.taken.blocks <= self.written.blocks <= self.total_blocks
        assert max(self.taken.ahead, self.written.ahead) <= self.total_blocks
        assert not self.committing or self.first_tokens is not None

    def take_commit(self) -> tuple[FirstToken, ...] | None:
        """The first tokens, once, when the link has every block or choices that all ended need no more."""
        if self.first_tokens is None or self.committing:
            return None
        goes_on = any(first.finish_reason is None for first in self.first_tokens)
        if self.taken.blocks < self.total_blocks and goes_on:
            return None
        self.committing = True
        return self.first_tokens
