"""Copies between blocks of a KV pool and a slab, one launch each, with the payload's checksum on the way.

Payloads are those of kernels.paged_kv. All is moved in 64-bit words, which are also those of the checksum:
each program leaves the sum over its words, and since sums mod 2**64 have no order the total is that of
kernels.checksums bit for bit.
"""

from collections.abc import Sequence
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checksums import WORD_BYTES
from kernels.triton_launch import Launch
from kernels.triton_noise import splitmix64

TILE_WORDS: Final = 1024
"""8 KiB a program: eight words, or four 16-byte accesses, of each of 128 threads."""


@triton.jit(do_not_specialize=["num_blocks"])
def copy_blocks_kernel(
    pool_ptr: tl.tensor, slab_ptr: tl.tensor, block_ids_ptr: tl.tensor, partial_sums_ptr: tl.tensor,
    layer_stride: tl.tensor, side_stride: tl.tensor, block_stride: tl.tensor, num_blocks: tl.tensor,
    run_words: tl.tensor,
    TO_SLAB: tl.constexpr, SUM: tl.constexpr, TILE: tl.constexpr,
) -> None:  # fmt: skip
    """A tile of one run: one side of one block of one layer. Runs lie in the slab in program order."""
    run = tl.program_id(0).to(tl.int64)
    words = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = words < run_words
    layer, side, block = run // (2 * num_blocks), run // num_blocks % 2, run % num_blocks
    block_id = tl.load(block_ids_ptr + block)
    in_pool = pool_ptr + layer * layer_stride + side * side_stride + block_id * block_stride + words
    at_word = run * run_words + words
    if TO_SLAB:
        moved = tl.load(in_pool, mask=mask, other=0)
        tl.store(slab_ptr + at_word, moved, mask=mask)
    else:
        moved = tl.load(slab_ptr + at_word, mask=mask, other=0)
        tl.store(in_pool, moved, mask=mask)
    if SUM:
        weights = splitmix64(at_word.to(tl.uint64, bitcast=True)) | 1
        total = tl.sum(moved * weights.to(tl.int64, bitcast=True), 0)
        tl.store(partial_sums_ptr + run * tl.num_programs(1) + tl.program_id(1), total)


def gather_blocks(
    group: Tensor, block_ids: Sequence[int], first_layer: int, num_layers: int, slab: Tensor
) -> int:
    """See kernels.paged_kv."""
    launch, _ = copy_blocks_launch(
        group, block_ids, first_layer, num_layers, slab, to_slab=True, summed=False
    )
    launch.run()
    return payload_bytes(group, len(block_ids), num_layers)


def scatter_blocks(
    group: Tensor, block_ids: Sequence[int], first_layer: int, num_layers: int, slab: Tensor
) -> int:
    """See kernels.paged_kv."""
    launch, _ = copy_blocks_launch(
        group, block_ids, first_layer, num_layers, slab, to_slab=False, summed=False
    )
    launch.run()
    return payload_bytes(group, len(block_ids), num_layers)


def gather_blocks_summed(
    group: Tensor, block_ids: Sequence[int], first_layer: int, num_layers: int, slab: Tensor
) -> tuple[int, Tensor]:
    """See kernels.summed_copies."""
    launch, sums = copy_blocks_launch(
        group, block_ids, first_layer, num_layers, slab, to_slab=True, summed=True
    )
    launch.run()
    return payload_bytes(group, len(block_ids), num_layers), sums.sum()


def scatter_blocks_summed(
    group: Tensor, block_ids: Sequence[int], first_layer: int, num_layers: int, slab: Tensor
) -> tuple[int, Tensor]:
    """See kernels.summed_copies."""
    launch, sums = copy_blocks_launch(
        group, block_ids, first_layer, num_layers, slab, to_slab=False, summed=True
    )
    launch.run()
    return payload_bytes(group, len(block_ids), num_layers), sums.sum()


def payload_bytes(group: Tensor, num_blocks: int, num_layers: int) -> int:
    """Size of the payload of that many blocks and layers of a KV group."""
    return 2 * num_layers * num_blocks * group[0, 0, 0].nbytes


def copy_blocks_launch(
    group: Tensor,
    block_ids: Sequence[int],
    first_layer: int,
    num_layers: int,
    slab: Tensor,
    *,
    to_slab: bool,
    summed: bool,
) -> tuple[Launch, Tensor]:
    """(the copy, what it leaves in `summed` mode: the checksum's partial sums, int64).

    group, block_ids and slab as in kernels.paged_kv; a block is one run of whole words.
    """
    layers = group.narrow(0, first_layer, num_layers)
    num_blocks = len(block_ids)
    num_bytes = payload_bytes(group, num_blocks, num_layers)
    assert num_bytes <= slab.numel(), f"payload of {num_bytes} bytes, slab of {slab.numel()}"
    assert slab.dtype == torch.uint8
    assert slab.is_contiguous()
    assert group[0, 0, 0].is_contiguous()
    words = layers.view(torch.int64)
    run_words = words[0, 0, 0].numel()
    tile = min(TILE_WORDS, triton.next_power_of_2(run_words))
    grid = (2 * num_layers * num_blocks, triton.cdiv(run_words, tile))
    sums = torch.empty(grid if summed else 0, dtype=torch.int64, device=group.device)
    launch = Launch(
        kernel=copy_blocks_kernel,
        grid=grid,
        args={
            "pool_ptr": words,
            "slab_ptr": slab[: num_bytes // WORD_BYTES * WORD_BYTES].view(torch.int64),
            "block_ids_ptr": torch.as_tensor(block_ids, dtype=torch.int64, device=group.device),
            "partial_sums_ptr": sums,
            "layer_stride": words.stride(0),
            "side_stride": words.stride(1),
            "block_stride": words.stride(2),
            "num_blocks": num_blocks,
            "run_words": run_words,
        },
        constexprs={"TO_SLAB": to_slab, "SUM": summed, "TILE": tile},
    )
    return launch, sums
