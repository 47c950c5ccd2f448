"""Ref-counted blocks of one KV group."""

from collections.abc import Iterable


class BlockPool:
    """Owner of the blocks 0..num_blocks-1: a free list and a count of the users of each block.

    Invariant: a block is on the free list, once, exactly when its ref count is 0.
    """

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks > 0
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._ref_counts = [0] * num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that nobody uses."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks with at least one user."""
        return self.num_blocks - len(self._free)

    def allocate(self, num_blocks: int) -> list[int]:
        """Take blocks that are free, each with one user; the caller has looked that there are enough."""
        assert 0 <= num_blocks <= len(self._free), f"{num_blocks} of {len(self._free)} free blocks"
        block_ids = [self._free.pop() for _ in range(num_blocks)]
        for block_id in block_ids:
            self._ref_counts[block_id] = 1
        return block_ids

    def share(self, block_ids: Iterable[int]) -> None:
        """One more user for each of these used blocks."""
        for block_id in block_ids:
            assert self._ref_counts[block_id] > 0, f"block {block_id} is free"
            self._ref_counts[block_id] += 1

    def free(self, block_ids: Iterable[int]) -> None:
        """One user less for each block; the last user's going makes it free."""
        for block_id in block_ids:
            assert self._ref_counts[block_id] > 0, f"block {block_id} is freed twice"
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] == 0:
                self._free.append(block_id)

    def ref_count(self, block_id: int) -> int:
        """Users of a block."""
        return self._ref_counts[block_id]

    def check(self) -> None:
        """Assert the class invariant."""
        assert len(set(self._free)) == len(self._free), "a block is on the free list twice"
        assert all(count >= 0 for count in self._ref_counts)
        unused = {block_id for block_id, count in enumerate(self._ref_counts) if count == 0}
        assert unused == set(self._free), "free list and ref counts disagree"
