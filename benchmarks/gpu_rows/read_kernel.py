"""A kernel that reads and does nothing else."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_launch import Launch

TILES_PER_PROGRAM = 16


@triton.jit
def read_kernel(data_ptr: tl.tensor, sums_ptr: tl.tensor, TILE: tl.constexpr, TILES: tl.constexpr) -> None:
    """Each program leaves the sum of TILES tiles in a row."""
    first = tl.program_id(0).to(tl.int64) * (TILE * TILES)
    total = tl.zeros((TILE,), dtype=tl.float32)
    for tile in range(TILES):
        total += tl.load(data_ptr + first + tile * TILE + tl.arange(0, TILE))
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total, 0))


def read_launch(data: Tensor, tile: int) -> Launch:
    """data: fp32, a multiple of what a program reads."""
    num_programs, rest = divmod(data.numel(), tile * TILES_PER_PROGRAM)
    assert rest == 0
    sums = torch.empty(num_programs, dtype=torch.float32, device=data.device)
    return Launch(
        kernel=read_kernel,
        grid=(num_programs,),
        args={"data_ptr": data, "sums_ptr": sums},
        constexprs={"TILE": tile, "TILES": TILES_PER_PROGRAM},
        num_warps=8,
    )
