"""The KV pool of a tensor-parallel worker: every rank holds its own heads of each block, under one id.

What changes blocks is told to all ranks in the order of the engine thread. Slabs of KV links are each rank's
own: its heads leave from, and arrive in, its process.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from engine.kv_pool import LocalKvPool
from engine.parallel.shard import Shard
from engine.parallel.wire import Ints, Op


class Commander(Protocol):
    """Whoever leads the ranks."""

    shard: Shard

    def tell(self, op: Op, *arrays: Sequence[int] | Ints, payload: Tensor | None = None) -> None:
        """Send one message to every follower; payload: uint8 on the host."""
        ...

    def leading(self) -> AbstractContextManager[None]:
        """Around whatever needs the other ranks."""
        ...


class LedKvPool:
    """See engine.kv_pool.KvPool. Only the first group is shared among the ranks; others are rank 0's."""

    def __init__(self, leader: Commander, local: LocalKvPool) -> None:
        self._leader = leader
        self.local = local
        """This rank's heads."""
        self.groups = local.groups

    def copy(self, group: int, source_ids: Sequence[int], target_ids: Sequence[int]) -> None:
        """See KvPool."""
        if group == 0:
            self._leader.tell(Op.COPY, source_ids, target_ids)
        self.local.copy(group, source_ids, target_ids)

    def store(self, block_tables: Sequence[Sequence[int]], slots: Sequence[int]) -> None:
        """See KvPool."""
        self._leader.tell(Op.STORE, block_tables[0], slots)
        self.local.store(block_tables, slots)

    def load(self, slots: Sequence[int], block_tables: Sequence[Sequence[int]]) -> None:
        """See KvPool."""
        self._leader.tell(Op.LOAD, slots, block_tables[0])
        self.local.load(slots, block_tables)
