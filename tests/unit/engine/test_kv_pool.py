"""Copies between a pool and slabs that lie elsewhere."""

import torch

from engine.kv_pool import gather_staged, scatter_staged
from kernels import ops


def test_a_slab_on_another_device_gets_and_gives_the_same_bytes():
    group = torch.rand(3, 2, 7, 4, 2, 8)
    block_ids, layers = [5, 0, 3], (1, 2)
    plain, staged = (torch.zeros(1 << 16, dtype=torch.uint8) for _ in range(2))
    num_bytes, total = ops.gather_blocks_summed(group, block_ids, *layers, plain)
    assert gather_staged(group, block_ids, *layers, staged) == (num_bytes, total)
    assert torch.equal(plain, staged)
    want, found = torch.zeros_like(group), torch.zeros_like(group)
    ops.scatter_blocks(want, [1, 2, 6], *layers, plain)
    assert scatter_staged(found, [1, 2, 6], *layers, staged) == (num_bytes, total)
    assert torch.equal(want, found)
    assert torch.equal(found[1:3, :, [1, 2, 6]], group[1:3, :, block_ids])
