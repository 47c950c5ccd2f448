"""Ref-counted blocks of one KV group."""

from collections import OrderedDict
from collections.abc import Iterable


class BlockPool:
    """Owner of the blocks 0..num_blocks-1. Each one is, at any time, exactly one of

    * free: on the free list, its content is nothing;
    * used: it has users (ref count > 0), whether or not the prefix cache knows it;
    * idle: nobody uses it, but it is kept for the prefix cache, in the order in which users went.
    """

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks > 0
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._ref_counts = [0] * num_blocks
        self._kept = [False] * num_blocks
        self._idle: OrderedDict[int, None] = OrderedDict()
        self.num_taken = 0
        """Users that blocks have got since the start."""
        self.num_returned = 0
        """Users that have gone."""

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give."""
        return len(self._free)

    @property
    def num_idle(self) -> int:
        """Blocks that are kept and have no user."""
        return len(self._idle)

    @property
    def num_used(self) -> int:
        """Blocks with at least one user."""
        return self.num_blocks - len(self._free) - len(self._idle)

    @property
    def oldest_idle(self) -> int:
        """The idle block whose last user went first; there must be one."""
        return next(iter(self._idle))

    def allocate(self, num_blocks: int) -> list[int]:
        """Take blocks that are free, each with one user; the caller has looked that there are enough."""
        assert 0 <= num_blocks <= len(self._free), f"{num_blocks} of {len(self._free)} free blocks"
        block_ids = [self._free.pop() for _ in range(num_blocks)]
        for block_id in block_ids:
            self._ref_counts[block_id] = 1
        self.num_taken += num_blocks
        return block_ids

    def share(self, block_ids: Iterable[int]) -> None:
        """One more user for each of these used or idle blocks."""
        for block_id in block_ids:
            assert self._ref_counts[block_id] > 0 or self._kept[block_id], f"block {block_id} is free"
            self._ref_counts[block_id] += 1
            self.num_taken += 1
            self._idle.pop(block_id, None)

    def free(self, block_ids: Iterable[int]) -> None:
        """One user less for each block; the last user's going makes it free, or idle if it is kept."""
        for block_id in block_ids:
            assert self._ref_counts[block_id] > 0, f"block {block_id} is freed twice"
            self._ref_counts[block_id] -= 1
            self.num_returned += 1
            if self._ref_counts[block_id] == 0 and self._kept[block_id]:
                self._idle[block_id] = None
            elif self._ref_counts[block_id] == 0:
                self._free.append(block_id)

    def keep(self, block_id: int) -> None:
        """A used block survives its users from now on, until `drop`; no-op if it does already."""
        assert self._ref_counts[block_id] > 0, f"block {block_id} has no user"
        self._kept[block_id] = True

    def drop(self, block_id: int) -> None:
        """The reverse of `keep`; an idle block is free at once."""
        assert self._kept[block_id], f"block {block_id} is not kept"
        self._kept[block_id] = False
        if block_id in self._idle:
            del self._idle[block_id]
            self._free.append(block_id)

    def ref_count(self, block_id: int) -> int:
        """Users of a block."""
        return self._ref_counts[block_id]

    def kept(self) -> set[int]:
        """All blocks that are kept, used and idle."""
        return {block_id for block_id, kept in enumerate(self._kept) if kept}

    def check(self) -> None:
        """Assert the class invariant."""
        assert len(set(self._free)) == len(self._free), "a block is on the free list twice"
        assert all(count >= 0 for count in self._ref_counts)
        unused = {block_id for block_id, count in enumerate(self._ref_counts) if count == 0}
        assert set(self._idle) == unused & self.kept(), "idle blocks are the kept ones without users"
        assert set(self._free) == unused - self.kept(), "free list and ref counts disagree"
        assert sum(self._ref_counts) == self.num_taken - self.num_returned
        assert self.num_free + self.num_idle + self.num_used == self.num_blocks
