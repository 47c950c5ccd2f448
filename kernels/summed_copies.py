"""Copies between blocks and slabs that also give the checksum of the payload.

The sum stays on the device as an int64 scalar, so that a copy need not be waited for; `unsigned` reads it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.checksums import UINT64_MASK, as_int64, checksum
from kernels.paged_kv import gather_blocks, scatter_blocks


def gather_blocks_summed(
    group: Tensor, block_ids: Sequence[int], first_layer: int, num_layers: int, slab: Tensor
) -> tuple[int, Tensor]:
    """`gather_blocks`, and the checksum of what it put into the slab: (bytes, int64 scalar)."""
    num_bytes = gather_blocks(group, block_ids, first_layer, num_layers, slab)
    return num_bytes, _sum(slab, num_bytes)


def scatter_blocks_summed(
    group: Tensor, block_ids: Sequence[int], first_layer: int, num_layers: int, slab: Tensor
) -> tuple[int, Tensor]:
    """`scatter_blocks`, and the checksum of what was in the slab: (bytes, int64 scalar).

    A wrong sum is known only when the blocks are written: nobody may read them before.
    """
    num_bytes = scatter_blocks(group, block_ids, first_layer, num_layers, slab)
    return num_bytes, _sum(slab, num_bytes)


def unsigned(total: Tensor) -> int:
    """The number that `checksum` gives, from the scalar of a summed copy; waits for the copy."""
    return int(total) & UINT64_MASK


def _sum(slab: Tensor, num_bytes: int) -> Tensor:
    return torch.tensor(as_int64(checksum(slab[:num_bytes])), dtype=torch.int64)
