"""The operators of a transformer block outside attention as Triton kernels: see kernels.layers.

Sums and rotations are fp32; values are rounded to the tensors' type where the references round them.
"""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_launch import Launch

MAX_HIDDEN: Final = 1 << 15
"""A row is one tile."""
SILU_TILE: Final = 1024


@triton.jit
def rms_norm_kernel(
    x_ptr: tl.tensor, residual_ptr: tl.tensor, weight_ptr: tl.tensor, out_ptr: tl.tensor,
    x_stride: tl.tensor, hidden: tl.tensor, eps: tl.tensor,
    ADD: tl.constexpr, TILE: tl.constexpr,
) -> None:  # fmt: skip
    """One row per program; with ADD x is added to the residual, of which the norm is taken."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, TILE)
    mask = columns < hidden
    x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        places = residual_ptr + row * hidden + columns
        total = (x + tl.load(places, mask=mask, other=0.0).to(tl.float32)).to(residual_ptr.dtype.element_ty)
        tl.store(places, total, mask=mask)
        x = total.to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / hidden + eps)
    normed = (x * scale).to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * hidden + columns, normed * weight, mask=mask)


@triton.jit
def silu_mul_kernel(
    gate_up_ptr: tl.tensor, out_ptr: tl.tensor, row_stride: tl.tensor, width: tl.tensor, TILE: tl.constexpr
) -> None:
    """A tile of a row per program."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = columns < width
    places = gate_up_ptr + row * row_stride + columns
    gate = tl.load(places, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(places + width, mask=mask, other=0.0).to(tl.float32)
    decay = tl.exp(-tl.abs(gate))
    silu = gate * tl.where(gate < 0, decay, 1.0) / (1.0 + decay)
    tl.store(out_ptr + row * width + columns, silu * up, mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See kernels.layers."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rms_norm_launch(x, None, weight, eps, out).run()
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See kernels.layers."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rms_norm_launch(x, residual, weight, eps, out).run()
    return out


def silu_mul(gate_up: Tensor) -> Tensor:
    """See kernels.layers."""
    out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    silu_mul_launch(gate_up, out).run()
    return out


def rms_norm_launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor) -> Launch:
    """`rms_norm`, or with a residual `add_rms_norm`, into `out`."""
    num_rows, hidden = x.shape
    assert weight.shape == (hidden,)
    assert 0 < hidden <= MAX_HIDDEN
    assert x.stride(1) == 1
    assert out.shape == x.shape
    assert out.dtype == x.dtype == weight.dtype
    if residual is not None:
        assert residual.shape == x.shape
        assert residual.dtype == x.dtype
        assert residual.is_contiguous()
    tile = triton.next_power_of_2(hidden)
    return Launch(
        kernel=rms_norm_kernel,
        grid=(num_rows,),
        args={
            "x_ptr": x,
            "residual_ptr": out if residual is None else residual,
            "weight_ptr": weight,
            "out_ptr": out,
            "x_stride": x.stride(0),
            "hidden": hidden,
            "eps": eps,
        },
        constexprs={"ADD": residual is not None, "TILE": tile},
        num_warps=min(max(tile // 512, 1), 16),
    )


def silu_mul_launch(gate_up: Tensor, out: Tensor) -> Launch:
    """`silu_mul` into `out`."""
    num_rows, width = out.shape
    assert gate_up.shape == (num_rows, 2 * width)
    assert gate_up.stride(1) == 1
    assert out.is_contiguous()
    tile = min(SILU_TILE, triton.next_power_of_2(width))
    return Launch(
        kernel=silu_mul_kernel,
        grid=(num_rows, triton.cdiv(width, tile)),
        args={"gate_up_ptr": gate_up, "out_ptr": out, "row_stride": gate_up.stride(0), "width": width},
        constexprs={"TILE": tile},
    )
