"""How exact a kernel has to be."""

import torch
from torch import Tensor


def assert_as_exact_as_torch(out: Tensor, plain: Tensor, exact: Tensor):
    """At most twice the error of the plain reference in the same dtype, both against float64.

    And two roundings, because the reference may be lucky.

    Triton's interpreter cuts bf16 off where torch and GPUs round it, which is as much again.
    """
    roundings = 2 if out.dtype != torch.bfloat16 or out.is_cuda else 4
    error, plain_error = ((result.double() - exact).abs().max().item() for result in (out, plain))
    rounding = torch.finfo(out.dtype).eps * exact.abs().max().item()
    assert error <= 2 * plain_error + roundings * rounding, (error, plain_error)
