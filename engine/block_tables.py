"""Gives requests their blocks: the one object through which KV memory is allocated and freed.

The life of a block:
1. `admit` or `grow` hands it to a request, whose KV is written into it.
2. `publish`: the block is full and its KV complete. From now on other requests may find it and share it.
3. Its last user goes: a published block stays, idle; any other one is free.
4. `_make_room` takes the block that has been idle longest when blocks run out.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from engine.block_keys import BlockKey, KeyFunction, no_keys
from engine.block_pool import BlockPool
from engine.block_table import BlockTable
from engine.draft_coverage import DraftCoverage
from engine.outputs import PrefixCacheStats
from engine.radix_cache import BlockIds, RadixCache
from engine.request import Request

CopyBlocks = Callable[[int, Sequence[int], Sequence[int]], None]
"""Called with (group, source ids, target ids) to copy whole blocks."""


class BlockTables:
    """The pools of all KV groups, equally large, what requests hold of them, and the prefix cache.

    A request's table has the same length in every group and is append-only until it is freed as a whole, with
    two exceptions: a published block may be exchanged for one of equal content, and the block at the cursor,
    if others hold it too, is copied before it is written. So nobody writes into a shared block. Copies are
    carried out by `run_copies`, before any block that was freed meanwhile is written.
    """

    def __init__(
        self,
        *,
        num_groups: int,
        num_blocks: int,
        block_size: int,
        keys: KeyFunction = no_keys,
        copy_blocks: CopyBlocks = lambda *_: None,
    ) -> None:
        self.pools = [BlockPool(num_blocks) for _ in range(num_groups)]
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.stats = PrefixCacheStats()
        self._keys = keys
        self._cache = RadixCache()
        self._has_retracted = False
        """What a request has published may be known no more."""
        self.draft_coverage = DraftCoverage(block_size)
        self._copy_blocks = copy_blocks
        self._copies: list[list[tuple[int, int]]] = [[] for _ in self.pools]
        self._in_flight: set[Request] = set()
        self._landing: list[Sequence[Sequence[int]]] = []
        """Blocks that were freed while a step that is on its way may read or write them, group by group."""

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now, in every group; idle ones give way."""
        return min(pool.num_free + pool.num_idle for pool in self.pools)

    @property
    def num_landing(self) -> int:
        """At most so many more can be allocated, in every group, when what is on its way has landed."""
        return sum(len(tables[0]) for tables in self._landing)

    @property
    def num_used(self) -> int:
        """Blocks that requests hold, in the fullest group."""
        return max(pool.num_used for pool in self.pools)

    @property
    def num_cached(self) -> int:
        """Blocks that nothing but the prefix cache holds."""
        return self.pools[0].num_idle

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return -(-num_tokens // self.block_size)

    def missing(self, request: Request, num_tokens: int) -> int:
        """Blocks to allocate in each group before `num_tokens` tokens of the request can be written."""
        held = len(request.block_tables[0]) if request.block_tables else 0
        lacking = -(-num_tokens // self.block_size) - held
        return (lacking if lacking > 0 else 0) + self._shares_cursor(request)

    def cost(self, request: Request, max_cached_tokens: int) -> int:
        """How many blocks less are free after `admit`: all but the cached ones that others use already."""
        shared = sum(
            self.pools[0].ref_count(block_ids[0]) > 0 for block_ids in self._match(request, max_cached_tokens)
        )
        return self.blocks_for(request.num_tokens) - shared

    def admit(self, request: Request, max_cached_tokens: int) -> None:
        """Give the request slots for all of its tokens; `cost` must be free.

        Of its first `max_cached_tokens` tokens, whole blocks that are cached are shared, and pinned by that.
        """
        assert not request.block_tables
        found = self._match(request, max_cached_tokens)
        request.block_tables = [
            BlockTable(block_ids[group] for block_ids in found) for group in range(len(self.pools))
        ]
        for pool, table in zip(self.pools, request.block_tables, strict=True):
            pool.share(table)
        request.num_published_blocks = len(found)
        request.num_cached_tokens = request.num_computed_tokens = len(found) * self.block_size
        self.draft_coverage.enter(request, [block_ids[0] for block_ids in found])
        self.stats.queries += request.num_tokens
        self.stats.hits += request.num_cached_tokens
        self.grow(request, request.num_tokens)

    def grow(self, request: Request, num_tokens: int) -> None:
        """Give the request slots for its first `num_tokens` tokens; `missing` must be free."""
        missing = self.missing(request, num_tokens)
        self._make_room(missing)
        if not request.block_tables:
            request.block_tables = [BlockTable() for _ in self.pools]
        if self._shares_cursor(request):
            self._unshare(request, request.num_computed_tokens // self.block_size)
            missing -= 1
        for pool, table in zip(self.pools, request.block_tables, strict=True):
            table += pool.allocate(missing)

    def _shares_cursor(self, request: Request) -> bool:
        """Whether the next token goes into a block that others hold too."""
        cursor = request.num_computed_tokens // self.block_size
        if not request.block_tables or cursor >= len(request.block_tables[0]):
            return False
        return self.pools[0].ref_count(request.block_tables[0][cursor]) > 1

    def _unshare(self, request: Request, position: int) -> None:
        for pool, table, copies in zip(self.pools, request.block_tables, self._copies, strict=True):
            (own,) = pool.allocate(1)
            copies.append((table[position], own))
            pool.free([table[position]])
            table.exchange(position, own)

    def run_copies(self) -> None:
        """Carry out the copies that `grow` decided."""
        for group, copies in enumerate(self._copies):
            if copies:
                self._copy_blocks(group, *zip(*copies, strict=True))
                copies.clear()

    def publish(self, request: Request) -> None:
        """Make the request's full blocks known to others; the KV of its computed tokens is complete.

        Where the content is known already, the request changes over to the known block and its own is free.
        Blocks of a prefill-only request are being read under their ids, so they stay its own and unknown,
        and so does what follows them.
        """
        num_full = request.num_computed_tokens // self.block_size
        is_new = num_full > request.num_published_blocks or self.draft_coverage.lags(request)
        if not is_new and not self._has_retracted:
            return
        if request.num_published_blocks > 0 and self._last_published(request) not in self._cache:
            request.num_published_blocks = request.num_draft_published_blocks = 0
        if num_full > request.num_published_blocks:
            self._publish_blocks(request, self._keys(request, num_full))
        self.draft_coverage.publish(request)

    def _publish_blocks(self, request: Request, keys: Sequence[BlockKey]) -> None:
        for position in range(request.num_published_blocks, len(keys)):
            own = tuple(table[position] for table in request.block_tables)
            above = self._last_published(request) if position else None
            known = self._cache.insert(position, above, keys[position], own)
            if known == own:
                self._keep(known)
            elif known is None or request.prefill_only:
                return
            else:
                self._exchange(request, position, known)
            request.num_published_blocks += 1

    def free(self, request: Request) -> None:
        """Take all blocks back; what is not published is gone. Of requests in flight, `land` takes them."""
        self._give_back(request, request.block_tables)
        request.block_tables = []
        request.num_computed_tokens = request.num_published_blocks = 0
        request.num_draft_computed_tokens = request.num_draft_published_blocks = 0

    def _give_back(self, request: Request, tables: Sequence[Sequence[int]]) -> None:
        """Free these blocks of a request, group by group; while a step reads or writes them, later."""
        if tables and request in self._in_flight:
            self._landing.append(tables)
        else:
            self._release(tables)

    def _release(self, tables: Sequence[Sequence[int]]) -> None:
        for pool, table in zip(self.pools, tables, strict=False):
            pool.free(reversed(table))

    def depart(self, requests: Iterable[Request]) -> None:
        """A step that reads and writes these requests' blocks, and no others', is on its way from now on."""
        self._in_flight = set(requests)

    def land(self) -> None:
        """The step before the one that departed last has ended: free what waited for it."""
        for tables in self._landing:
            self._release(tables)
        self._landing.clear()

    def retract(self, request: Request) -> None:
        """The KV of a request is bad: forget every sequence that starts with its first block.

        It may have got the fault from any block that it shares, or have passed it on.
        """
        if request.block_tables and request.block_tables[0][0] in self._cache:
            self._has_retracted = True
            for block_ids in self._cache.remove_family(request.block_tables[0][0]):
                self._drop(block_ids)
        request.num_published_blocks = request.num_draft_published_blocks = 0

    def _match(self, request: Request, max_tokens: int) -> list[BlockIds]:
        # Log-probabilities of a prompt need the logits of all of its positions.
        if request.prompt_logprobs is not None:
            return []
        return self._cache.match(self._keys(request, max_tokens // self.block_size))

    def _last_published(self, request: Request) -> int:
        return request.block_tables[0][request.num_published_blocks - 1]

    def _exchange(self, request: Request, position: int, known: BlockIds) -> None:
        own = [[table[position]] for table in request.block_tables]
        for pool, table, block_id in zip(self.pools, request.block_tables, known, strict=True):
            pool.share([block_id])
            table.exchange(position, block_id)
        self._give_back(request, own)
        self.draft_coverage.exchange(request, position, known[0])

    def _make_room(self, num_blocks: int) -> None:
        """Free idle blocks, oldest first, until so many are free in every group."""
        while any(pool.num_free < num_blocks for pool in self.pools):
            self._drop(self._cache.remove_leaf(self.pools[0].oldest_idle))
            self.stats.evicted_blocks += 1

    def _keep(self, block_ids: BlockIds) -> None:
        for pool, block_id in zip(self.pools, block_ids, strict=True):
            pool.keep(block_id)

    def _drop(self, block_ids: BlockIds) -> None:
        self.draft_coverage.drop(block_ids[0])
        for pool, block_id in zip(self.pools, block_ids, strict=True):
            pool.drop(block_id)

    def check(self, requests: Iterable[Request]) -> None:
        """Assert that the given live requests, with those that land, hold exactly the used blocks, and share
        in the tree's order."""
        assert not any(self._copies), "blocks are still to be copied"
        tables = [request.block_tables for request in requests if request.block_tables] + self._landing
        for group, pool in enumerate(self.pools):
            pool.check()
            held = Counter(block_id for table in tables for block_id in table[group])
            counts = [pool.ref_count(block_id) for block_id in range(pool.num_blocks)]
            assert counts == [held[block_id] for block_id in range(pool.num_blocks)], "leaked or stolen"
            assert len(pool.kept()) == len(self._cache)
        self._cache.check()
        assert self.draft_coverage.block_ids <= self.pools[0].kept()
        assert all(block_id in self._cache for block_id in self.pools[0].kept())
        for above, below in self._cache.links():
            assert self.pools[0].ref_count(above) >= self.pools[0].ref_count(below)
