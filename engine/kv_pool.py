"""The tensors of a KV pool, and all copies of whole blocks: inside it, to the host and back, to slabs."""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from engine.facts import KvGroupSpec
from engine.host_kv import HostKv
from kernels import ops
from kernels.summed_copies import unsigned


class KvPool(Protocol):
    """Blocks with all of their heads, wherever these lie. The engine's thread alone writes into it."""

    groups: list[Tensor]
    """Per KV group what this process holds: [num_layers, 2, num_blocks, block_size, heads, head_dim]."""

    @property
    def local(self) -> "LocalKvPool":
        """What this process holds."""
        ...

    def copy(self, group: int, source_ids: Sequence[int], target_ids: Sequence[int]) -> None:
        """Whole blocks to others of the same group; see kernels.ops.copy_blocks."""
        ...

    def store(self, block_tables: Sequence[Sequence[int]], slots: Sequence[int]) -> None:
        """Blocks to host memory; see engine.swap_space.BlockMover."""
        ...

    def load(self, slots: Sequence[int], block_tables: Sequence[Sequence[int]]) -> None:
        """Host memory to blocks."""
        ...


class LocalKvPool:
    """A pool in the memory of this process."""

    def __init__(
        self,
        specs: Sequence[KvGroupSpec],
        *,
        num_blocks: int,
        block_size: int,
        num_host_blocks: int,
        device: torch.device,
    ) -> None:
        self.num_blocks = num_blocks
        self.num_host_blocks = num_host_blocks
        self.groups = [_allocate(spec, num_blocks, block_size, device) for spec in specs]
        self._host = HostKv(self.groups, num_host_blocks)

    @property
    def local(self) -> "LocalKvPool":
        """See KvPool."""
        return self

    def copy(self, group: int, source_ids: Sequence[int], target_ids: Sequence[int]) -> None:
        """See KvPool."""
        ops.copy_blocks(self.groups[group], source_ids, target_ids)

    def store(self, block_tables: Sequence[Sequence[int]], slots: Sequence[int]) -> None:
        """See KvPool."""
        self._host.store(block_tables, slots)

    def load(self, slots: Sequence[int], block_tables: Sequence[Sequence[int]]) -> None:
        """See KvPool."""
        self._host.load(slots, block_tables)

    def gather(
        self,
        group: int,
        block_ids: Sequence[int],
        first_layer: int,
        num_layers: int,
        slab: Tensor,
        heads: range | None = None,
    ) -> int:
        """Blocks to the start of a slab, complete on return; the payload's checksum. From any thread.

        `heads`, of those in this process, are all if they are not named.
        """
        blocks = self.groups[group]
        if heads is not None and len(heads) < blocks.shape[-2]:
            return gather_heads(blocks, block_ids, first_layer, num_layers, slab, heads)
        copy = ops.gather_blocks_summed if slab.device == blocks.device else gather_staged
        return unsigned(copy(blocks, block_ids, first_layer, num_layers, slab)[1])

    def scatter(
        self,
        group: int,
        block_ids: Sequence[int],
        first_layer: int,
        num_layers: int,
        slab: Tensor,
        heads: range | None = None,
    ) -> int:
        """The payload of a `gather` to blocks; its checksum as it was read. The slab is free on return.

        A wrong checksum is known only when the blocks are written: nobody may read them before.
        """
        blocks = self.groups[group]
        if heads is not None and len(heads) < blocks.shape[-2]:
            return scatter_heads(blocks, block_ids, first_layer, num_layers, slab, heads)
        copy = ops.scatter_blocks_summed if slab.device == blocks.device else scatter_staged
        return unsigned(copy(blocks, block_ids, first_layer, num_layers, slab)[1])


def gather_heads(
    group: Tensor, block_ids: Sequence[int], first_layer: int, num_layers: int, slab: Tensor, heads: range
) -> int:
    """Some heads of whole blocks to the start of a slab, packed as kernels.ops.gather_blocks packs a pool of
    these heads alone; the checksum. For workers of different tensor parallel sizes, and not fused."""
    ids = torch.tensor(block_ids, device=group.device)
    part = _heads(group, first_layer, num_layers, heads).index_select(2, ids)
    payload = slab[: part.nbytes]
    payload.copy_(part.view(-1).view(torch.uint8))
    return ops.checksum(payload)


def scatter_heads(
    group: Tensor, block_ids: Sequence[int], first_layer: int, num_layers: int, slab: Tensor, heads: range
) -> int:
    """The reverse of `gather_heads`; the checksum of what was in the slab, which is free on return."""
    ids = torch.tensor(block_ids, device=group.device)
    target = _heads(group, first_layer, num_layers, heads)
    shape = (*target.shape[:2], len(block_ids), *target.shape[3:])
    payload = slab[: math.prod(shape) * group.element_size()]
    target.index_copy_(2, ids, payload.to(group.device).view(group.dtype).view(shape))
    return ops.checksum(payload)


def _heads(group: Tensor, first_layer: int, num_layers: int, heads: range) -> Tensor:
    return group.narrow(0, first_layer, num_layers).narrow(-2, heads.start, len(heads))


def gather_staged(
    group: Tensor, block_ids: Sequence[int], first_layer: int, num_layers: int, slab: Tensor
) -> tuple[int, Tensor]:
    """kernels.ops.gather_blocks_summed into a slab on another device: one launch, then one copy."""
    staging = torch.empty_like(slab, device=group.device)
    num_bytes, total = ops.gather_blocks_summed(group, block_ids, first_layer, num_layers, staging)
    slab[:num_bytes].copy_(staging[:num_bytes])
    return num_bytes, total


def scatter_staged(
    group: Tensor, block_ids: Sequence[int], first_layer: int, num_layers: int, slab: Tensor
) -> tuple[int, Tensor]:
    """kernels.ops.scatter_blocks_summed from a slab on another device; the slab is free on return."""
    block_bytes = group[:, :, 0].nbytes // len(group)
    num_bytes = block_bytes * num_layers * len(block_ids)
    staging = slab[:num_bytes].to(group.device, copy=True)
    return ops.scatter_blocks_summed(group, block_ids, first_layer, num_layers, staging)


def _allocate(spec: KvGroupSpec, num_blocks: int, block_size: int, device: torch.device) -> Tensor:
    """Not filled: a CPU maps memory when it is touched, and slots are read only after they are written."""
    shape = (spec.num_layers, 2, num_blocks, block_size, spec.num_kv_heads, spec.head_dim)
    return torch.empty(shape, dtype=getattr(torch, spec.dtype), device=device)
