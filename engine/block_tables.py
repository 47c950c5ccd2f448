"""Gives requests their blocks: the one object through which KV memory is allocated and freed."""

from collections import Counter
from collections.abc import Iterable

from engine.block_pool import BlockPool
from engine.request import Request


class BlockTables:
    """The pools of all KV groups, equally large, and what requests hold of them.

    A request's table has the same length in every group and is append-only until it is freed as a whole.
    """

    def __init__(self, *, num_groups: int, num_blocks: int, block_size: int) -> None:
        self.pools = [BlockPool(num_blocks) for _ in range(num_groups)]
        self.block_size = block_size
        self.num_blocks = num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now, in every group."""
        return min(pool.num_free for pool in self.pools)

    @property
    def num_used(self) -> int:
        """Blocks that requests hold, in the fullest group."""
        return max(pool.num_used for pool in self.pools)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return -(-num_tokens // self.block_size)

    def missing(self, request: Request, num_tokens: int) -> int:
        """Blocks to allocate in each group before `num_tokens` tokens of the request have a slot."""
        held = len(request.block_tables[0]) if request.block_tables else 0
        return max(self.blocks_for(num_tokens) - held, 0)

    def grow(self, request: Request, num_tokens: int) -> None:
        """Give the request slots for its first `num_tokens` tokens; `missing` must be free."""
        missing = self.missing(request, num_tokens)
        if not request.block_tables:
            request.block_tables = [[] for _ in self.pools]
        for pool, table in zip(self.pools, request.block_tables, strict=True):
            table += pool.allocate(missing)

    def free(self, request: Request) -> None:
        """Take all blocks back; what was computed is gone."""
        for pool, table in zip(self.pools, request.block_tables, strict=False):
            pool.free(table)
        request.block_tables = []
        request.num_computed_tokens = 0

    def check(self, requests: Iterable[Request]) -> None:
        """Assert that the given live requests hold exactly the used blocks."""
        tables = [request.block_tables for request in requests if request.block_tables]
        for group, pool in enumerate(self.pools):
            pool.check()
            held = Counter(block_id for table in tables for block_id in table[group])
            counts = [pool.ref_count(block_id) for block_id in range(pool.num_blocks)]
            assert counts == [held[block_id] for block_id in range(pool.num_blocks)], "leaked or stolen"
