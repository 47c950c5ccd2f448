"""Host memory for the KV of preempted requests: who holds which slots. Integers; a BlockMover copies."""

from collections.abc import Iterable, Sequence
from typing import Protocol

from engine.block_tables import BlockTables
from engine.request import Request, RequestState


class BlockMover(Protocol):
    """Copies blocks of all KV groups between pool and host; whoever uses them next finds it done."""

    def store(self, block_tables: Sequence[Sequence[int]], slots: Sequence[int]) -> None:
        """Pool to host. One table per group, each as long as `slots`."""
        ...

    def load(self, slots: Sequence[int], block_tables: Sequence[Sequence[int]]) -> None:
        """Host to pool."""
        ...


class SwapSpace:
    """`num_slots` slots of one block in every KV group, and the swapped requests that hold them."""

    def __init__(self, tables: BlockTables, mover: BlockMover, *, num_slots: int) -> None:
        self._tables = tables
        self._mover = mover
        self._num_slots = num_slots
        # Slots that were used and freed; those from `_num_touched` on were never used, their memory neither.
        self._freed: list[int] = []
        self._num_touched = 0
        self._slots: dict[Request, list[int]] = {}

    @property
    def num_used(self) -> int:
        """Slots that hold KV."""
        return self._num_touched - len(self._freed)

    @property
    def is_crowded(self) -> bool:
        """Less than a tenth is free; never without slots."""
        return 10 * (self._num_slots - self.num_used) < self._num_slots

    def has_room(self, request: Request) -> bool:
        """Whether the request's computed KV can be stored now."""
        return self._tables.blocks_for(request.num_computed_tokens) <= self._num_slots - self.num_used

    def swap_out(self, request: Request) -> None:
        """Move a request's computed KV to the host and free its blocks; there must be room."""
        num_computed_tokens = request.num_computed_tokens
        num_draft_computed_tokens = request.num_draft_computed_tokens
        num_blocks = self._tables.blocks_for(num_computed_tokens)
        slots = [self._take() for _ in range(num_blocks)]
        self._mover.store([table[:num_blocks] for table in request.block_tables], slots)
        self._slots[request] = slots
        self._tables.free(request)
        request.num_computed_tokens = num_computed_tokens
        request.num_draft_computed_tokens = num_draft_computed_tokens

    def swap_in(self, request: Request) -> None:
        """Give the request blocks for all its tokens and its KV back; their cost must be free.

        What the prefix cache still has of it is not copied.
        """
        num_computed_tokens = request.num_computed_tokens
        num_draft_computed_tokens = request.num_draft_computed_tokens
        self._tables.admit(request, num_computed_tokens)
        kept = self._tables.blocks_for(request.num_computed_tokens)
        slots = self._slots[request]
        self._mover.load(slots[kept:], [table[kept : len(slots)] for table in request.block_tables])
        request.num_computed_tokens = num_computed_tokens
        self._tables.draft_coverage.arrive(request, num_draft_computed_tokens)
        self.drop(request)

    def drop(self, request: Request) -> None:
        """Forget what is stored of a request, if anything."""
        self._freed += self._slots.pop(request, ())

    def _take(self) -> int:
        if self._freed:
            return self._freed.pop()
        self._num_touched += 1
        return self._num_touched - 1

    def check(self, live: Iterable[Request]) -> None:
        """Assert that exactly the swapped ones of the live requests hold slots, each slot once."""
        held = [slot for slots in self._slots.values() for slot in slots]
        assert sorted(held + self._freed) == list(range(self._num_touched)), "a slot is leaked or shared"
        assert self._num_touched <= self._num_slots
        swapped = {request for request in live if request.state is RequestState.SWAPPED}
        assert set(self._slots) == swapped
        for request, slots in self._slots.items():
            assert len(slots) == self._tables.blocks_for(request.num_computed_tokens)


class NoMover:
    """For a space without slots: nothing is ever copied."""

    def store(self, block_tables: Sequence[Sequence[int]], slots: Sequence[int]) -> None:
        """Only of a request without computed KV."""
        assert not slots

    def load(self, slots: Sequence[int], block_tables: Sequence[Sequence[int]]) -> None:
        """Only of a request without computed KV."""
        assert not slots
