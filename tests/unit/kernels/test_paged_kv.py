import pytest
import torch

from kernels import ops, paged_kv

SHAPE = (4, 2, 12, 4, 2, 8)


@pytest.fixture
def group():
    torch.manual_seed(0)
    return torch.randn(SHAPE)


@pytest.mark.parametrize("store_kv", [ops.store_kv, paged_kv.store_kv])
def test_store_writes_its_slots_and_ignores_padding_rows(group, store_kv):
    before = group[1].clone()
    k, v = torch.randn(2, 5, 2, 8)
    store_kv(k, v, group[1], torch.tensor([9, 0, 47, -1]))
    for side, (new, old) in enumerate(((k, before[0]), (v, before[1]))):
        want = old.reshape(48, 2, 8).clone()
        want[9], want[0], want[47] = new[0], new[1], new[2]
        assert torch.equal(group[1, side].reshape(48, 2, 8), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gather_puts_the_payload_at_the_start_of_the_slab(group, dtype):
    group = group.to(dtype)
    slab = torch.full((1 << 15,), 7, dtype=torch.uint8)
    block_ids = [11, 0, 5]
    num_bytes = ops.gather_blocks(group, block_ids, 1, 2, slab)
    want = group[1:3][:, :, block_ids].contiguous()
    assert num_bytes == want.nbytes
    assert torch.equal(slab[:num_bytes], want.view(-1).view(torch.uint8))
    assert (slab[num_bytes:] == 7).all()


def test_scatter_undoes_gather_and_touches_nothing_else(group):
    slab = torch.empty(1 << 14, dtype=torch.uint8)
    num_bytes = ops.gather_blocks(group, torch.tensor([3, 8]), 2, 2, slab)
    other = torch.zeros(SHAPE)
    assert ops.scatter_blocks(other, [10, 1], 2, 2, slab) == num_bytes
    assert torch.equal(other[2:, :, [10, 1]], group[2:, :, [3, 8]])
    assert other.count_nonzero() == group[2:, :, [3, 8]].count_nonzero()


@pytest.mark.skipif(not __debug__, reason="our asserts are off")
def test_a_payload_larger_than_the_slab_is_refused(group):
    with pytest.raises(AssertionError, match="slab of 100"):
        ops.gather_blocks(group, [0], 0, 1, torch.empty(100, dtype=torch.uint8))
