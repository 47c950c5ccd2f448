"""Copies of blocks in Triton against plain torch; `-m gpu` runs the same tests compiled."""

import pytest
import torch

from kernels import checksums, paged_kv, summed_copies, triton_blocks

pytestmark = pytest.mark.usefixtures("poisoned_memory")

GROUPS = [
    ((4, 2, 12, 4, 2, 8), torch.float32),
    ((3, 2, 7, 16, 3, 80), torch.bfloat16),
    ((2, 2, 5, 16, 1, 8), torch.float8_e4m3fn),
    ((1, 2, 6, 1, 1, 4), torch.float16),
    ((2, 2, 5, 16, 9, 64), torch.float16),
]


@pytest.fixture(params=GROUPS, ids=lambda group: str(group[1]).removeprefix("torch."))
def group(request, device):
    shape, dtype = request.param
    torch.manual_seed(0)
    return torch.randn(shape).to(dtype).to(device)


def slab_of_sevens(group, num_bytes=1 << 17):
    return torch.full((num_bytes,), 7, dtype=torch.uint8, device=group.device)


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("block_ids", [[4, 0, 2], [1], []])
def test_gather_is_the_references_and_sums_the_payload(group, block_ids):
    num_layers = max(len(group) - 1, 1)
    first_layer = len(group) - num_layers
    slabs = [slab_of_sevens(group) for _ in range(3)]
    want = paged_kv.gather_blocks(group, block_ids, first_layer, num_layers, slabs[0])
    num_bytes, total = triton_blocks.gather_blocks_summed(group, block_ids, first_layer, num_layers, slabs[1])
    assert triton_blocks.gather_blocks(group, block_ids, first_layer, num_layers, slabs[2]) == want
    assert num_bytes == want
    assert torch.equal(slabs[0], slabs[1])
    assert torch.equal(slabs[0], slabs[2])
    assert summed_copies.unsigned(total) == checksums.checksum(slabs[0][:num_bytes])


def test_scatter_undoes_gather_touches_nothing_else_and_sums_the_payload(group):
    slab = slab_of_sevens(group)
    num_bytes = triton_blocks.gather_blocks(group, [4, 0, 2], 0, 1, slab)
    for scatter in (triton_blocks.scatter_blocks, triton_blocks.scatter_blocks_summed):
        other = torch.zeros_like(group)
        scattered = scatter(other, [1, 3, 4], 0, 1, slab)
        assert torch.equal(bits(other[0, :, [1, 3, 4]]), bits(group[0, :, [4, 0, 2]]))
        other.view(torch.uint8)[0, :, [1, 3, 4]] = 0
        assert not other.view(torch.uint8).any()
    assert scattered[0] == num_bytes
    assert summed_copies.unsigned(scattered[1]) == checksums.checksum(slab[:num_bytes])


def test_block_ids_may_lie_on_the_device_and_slabs_inside_others(group):
    slabs = slab_of_sevens(group)
    slab = slabs[64:]
    block_ids = torch.tensor([2, 3], device=group.device)
    num_bytes = triton_blocks.gather_blocks(group, block_ids, 0, 1, slab)
    assert torch.equal(slab[:num_bytes], bits(group[:1, :, [2, 3]]).view(-1))
    assert (slabs[:64] == 7).all()


def test_blocks_lie_at_64_bit_addresses(device, far_apart):
    num_blocks = 2**31 // 128 + 2
    pool = far_apart((num_blocks + 1) * 128, torch.int64).view(-1, 128)
    # The sides overlap but for a block, to save memory on a GPU.
    group = pool.as_strided((1, 2, num_blocks, 8, 2, 8), (1 << 40, 128, 128, 16, 8, 1))
    pool[-2:] = torch.arange(256, device=device).view(2, 128)
    slab = slab_of_sevens(group)
    num_bytes = triton_blocks.gather_blocks(group, [num_blocks - 1], 0, 1, slab)
    assert slab[:num_bytes].view(torch.int64).tolist() == list(range(256))
    pool[-2:] = 0
    triton_blocks.scatter_blocks(group, [num_blocks - 1], 0, 1, slab)
    assert pool[-2:].view(-1).tolist() == list(range(256))
    assert not pool[:1000].any()


def test_the_reference_sums_what_it_copies():
    group, slab = torch.randn(2, 2, 4, 2, 1, 8), torch.empty(1 << 12, dtype=torch.uint8)
    num_bytes, total = summed_copies.gather_blocks_summed(group, [1, 2], 0, 2, slab)
    assert summed_copies.unsigned(total) == checksums.checksum(slab[:num_bytes])
    other = torch.zeros_like(group)
    assert summed_copies.scatter_blocks_summed(other, [0, 3], 0, 2, slab) == (num_bytes, total)
    assert torch.equal(other[:, :, [0, 3]], group[:, :, [1, 2]])


def test_a_payload_larger_than_the_slab_is_refused(group):
    with pytest.raises(AssertionError, match="slab of 8"):
        triton_blocks.gather_blocks(group, [0], 0, 1, slab_of_sevens(group, 8))
