"""The KV pool of a tensor-parallel worker: every rank holds its own heads of each block, under one id.

What changes blocks is told to all ranks in the order of the engine thread. What leaves for a slab, or comes
from one, has all heads: rank 0 puts them together and takes them apart, so that the other end of a KV link
need not know how many ranks there are here.
"""

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from engine.kv_pool import LocalKvPool
from engine.parallel.member import Member
from engine.parallel.shard import Shard
from engine.parallel.wire import Ints, Op, encode, raw
from kernels import ops


class Commander(Protocol):
    """Whoever leads the ranks."""

    shard: Shard
    members: Sequence[Member]

    def tell(self, op: Op, *arrays: Sequence[int] | Ints, payload: Tensor | None = None) -> None:
        """Send one message to every follower; payload: uint8 on the host."""
        ...

    def leading(self) -> AbstractContextManager[None]:
        """Around whatever needs the other ranks."""
        ...


class LedKvPool:
    """See engine.kv_pool.KvPool. Only the first group is shared among the ranks; others are rank 0's."""

    def __init__(self, leader: Commander, local: LocalKvPool, num_kv_heads: int) -> None:
        self._leader = leader
        self._local = local
        self._num_kv_heads = num_kv_heads
        # One gather at a time: a link's thread sends to all followers, then takes their answers.
        self._gathering = threading.Lock()
        self.groups = local.groups

    def copy(self, group: int, source_ids: Sequence[int], target_ids: Sequence[int]) -> None:
        """See KvPool."""
        if group == 0:
            self._leader.tell(Op.COPY, source_ids, target_ids)
        self._local.copy(group, source_ids, target_ids)

    def store(self, block_tables: Sequence[Sequence[int]], slots: Sequence[int]) -> None:
        """See KvPool."""
        self._leader.tell(Op.STORE, block_tables[0], slots)
        self._local.store(block_tables, slots)

    def load(self, slots: Sequence[int], block_tables: Sequence[Sequence[int]]) -> None:
        """See KvPool."""
        self._leader.tell(Op.LOAD, slots, block_tables[0])
        self._local.load(slots, block_tables)

    def gather(
        self, group: int, block_ids: Sequence[int], first_layer: int, num_layers: int, slab: Tensor
    ) -> int:
        """See KvPool."""
        if group != 0:
            return self._local.gather(group, block_ids, first_layer, num_layers, slab)
        whole = self._payload(slab, num_layers, len(block_ids), self._num_kv_heads)
        owners = [member for member in self._leader.members if self._owns(member)]
        message = encode(Op.GATHER, block_ids, [first_layer, num_layers])
        with self._gathering, self._leader.leading():
            for member in owners:
                member.reads.send(message)
            self._heads(whole, self._leader.shard.rank).copy_(self._own(block_ids, first_layer, num_layers))
            for member in owners:
                heads = self._heads(whole, member.rank)
                payload = torch.frombuffer(member.reads.expect(Op.GATHERED).payload, dtype=torch.uint8)
                heads.copy_(payload.view(heads.dtype).view(heads.shape))
        return ops.checksum(slab[: whole.nbytes])

    def scatter(
        self, group: int, block_ids: Sequence[int], first_layer: int, num_layers: int, slab: Tensor
    ) -> int:
        """See KvPool."""
        if group != 0:
            return self._local.scatter(group, block_ids, first_layer, num_layers, slab)
        whole = self._payload(slab, num_layers, len(block_ids), self._num_kv_heads)
        layers = [first_layer, num_layers]
        with self._leader.leading():
            for member in self._leader.members:
                payload = _bytes(self._heads(whole, member.rank))
                message = encode(Op.SCATTER, block_ids, layers, num_payload_bytes=len(payload))
                member.commands.send(message, raw(payload))
        own = _bytes(self._heads(whole, self._leader.shard.rank))
        self._local.scatter(group, block_ids, first_layer, num_layers, own)
        return ops.checksum(slab[: whole.nbytes])

    def _owns(self, member: Member) -> bool:
        """Whether no lower rank stores the same heads."""
        return self._range(member.rank) != self._range(member.rank - 1)

    def _range(self, rank: int) -> range:
        return Shard(rank, self._leader.shard.size).kv_heads(self._num_kv_heads)

    def _heads(self, payload: Tensor, rank: int) -> Tensor:
        heads = self._range(rank)
        return payload.narrow(-2, heads.start, len(heads))

    def _own(self, block_ids: Sequence[int], first_layer: int, num_layers: int) -> Tensor:
        heads = self.groups[0]
        slab = torch.empty(
            num_layers * len(block_ids) * heads[0, :, 0].nbytes, dtype=torch.uint8, device=heads.device
        )
        self._local.gather(0, block_ids, first_layer, num_layers, slab)
        return self._payload(slab, num_layers, len(block_ids), heads.shape[-2])

    def _payload(self, slab: Tensor, num_layers: int, num_blocks: int, num_heads: int) -> Tensor:
        """The start of a slab as [num_layers, 2, num_blocks, block_size, num_heads, head_dim]."""
        group = self.groups[0]
        block_size, _, head_dim = group.shape[3:]
        count = num_layers * 2 * num_blocks * block_size * num_heads * head_dim
        payload = slab[: count * group.element_size()].view(group.dtype)
        return payload.view(num_layers, 2, num_blocks, block_size, num_heads, head_dim)


def _bytes(heads: Tensor) -> Tensor:
    return heads.contiguous().view(-1).view(torch.uint8)
