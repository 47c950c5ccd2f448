"""The tensors of a swap space, and the copies between them and the KV pool."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import ops

SLAB_BYTES = 4 << 20
"""Staging between pool and host; more moves in several rounds."""


class HostKv:
    """Per KV group a host tensor of the pool's shape, with `num_slots` slots for blocks."""

    def __init__(self, groups: Sequence[Tensor], num_slots: int) -> None:
        self._groups = groups
        # Not filled: the system maps a page of it when it is first written.
        self._host = [_host_tensor(group, num_slots) for group in groups]

    def store(self, block_tables: Sequence[Sequence[int]], slots: Sequence[int]) -> None:
        """Pool to host, complete on return."""
        for group, host, table in zip(self._groups, self._host, block_tables, strict=True):
            _copy(group, table, host, slots)

    def load(self, slots: Sequence[int], block_tables: Sequence[Sequence[int]]) -> None:
        """Host to pool; what reads the pool next on its device finds the blocks there."""
        for group, host, table in zip(self._groups, self._host, block_tables, strict=True):
            _copy(host, slots, group, table)


def _host_tensor(group: Tensor, num_slots: int) -> Tensor:
    shape = (*group.shape[:2], num_slots, *group.shape[3:])
    return torch.empty(shape, dtype=group.dtype)


def _copy(source: Tensor, source_ids: Sequence[int], target: Tensor, target_ids: Sequence[int]) -> None:
    """Blocks `source_ids` of one group tensor to blocks `target_ids` of another, through a slab on each side.

    A slab on the host is pinned: it is what moves, and the tensor behind it may be large and never used.
    """
    num_layers = source.shape[0]
    block_bytes = source[:, :, 0].nbytes
    step = max(SLAB_BYTES // block_bytes, 1)
    slab_bytes = min(step, len(source_ids)) * block_bytes
    slab = _slab(slab_bytes, source, beside=target)
    landing = _slab(slab_bytes, target, beside=source)
    for first in range(0, len(source_ids), step):
        num_bytes = ops.gather_blocks(source, source_ids[first : first + step], 0, num_layers, slab)
        payload = landing[:num_bytes].copy_(slab[:num_bytes])
        ops.scatter_blocks(target, target_ids[first : first + step], 0, num_layers, payload)


def _slab(num_bytes: int, side: Tensor, *, beside: Tensor) -> Tensor:
    pinned = beside.is_cuda and not side.is_cuda
    return torch.empty(num_bytes, dtype=torch.uint8, device=side.device, pin_memory=pinned)
