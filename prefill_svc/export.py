"""What a prefill worker still owes one transfer: which computed blocks may travel next."""

from dataclasses import dataclass

from kvtransfer.messages import FirstToken
from worker.attach import AttemptKey


@dataclass(slots=True, kw_only=True, eq=False)
class Export:
    """The sending side of one attempt; owned by the event loop.

    0 ............ handed over ............ computed ............ total_blocks
    the link has them          may travel             not yet computed
    """

    key: AttemptKey
    transfer_id: bytes
    num_tokens: int
    """Tokens whose KV travels: the prompt and what earlier attempts emitted."""
    block_size: int
    block_tables: tuple[tuple[int, ...], ...] = ()
    """Per KV group the blocks of the sequence so far; replaced, never changed: a pump may be reading it."""
    computed: int = 0
    handed_over: int = 0
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

    def advance(self, block_tables: tuple[tuple[int, ...], ...], num_computed_tokens: int) -> None:
        """The engine has computed so many tokens; a block is done when it is full or the sequence's last."""
        done = num_computed_tokens == self.num_tokens
        self.computed = self.total_blocks if done else num_computed_tokens // self.block_size
        self.block_tables = block_tables

    def take(self) -> range:
        """Block positions that may travel now; each is given out once."""
        ready = range(self.handed_over, self.computed)
        self.handed_over = self.computed
        return ready

    def take_commit(self) -> tuple[FirstToken, ...] | None:
        """The first tokens, once, when the link has every block or choices that all ended need no more."""
        if self.first_tokens is None or self.committing:
            return None
        goes_on = any(first.finish_reason is None for first in self.first_tokens)
        if self.handed_over < self.total_blocks and goes_on:
            return None
        self.committing = True
        return self.first_tokens
