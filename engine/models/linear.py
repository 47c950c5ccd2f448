"""Linear layers, with their weights in the layout that is fastest where they run."""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_PACKED_ELEMENTS = 1 << 22
"""oneDNN needs about 25 µs per call more than the plain product, which only large weights earn back."""

TYPICAL_ROWS = 512
"""For which oneDNN chooses the layout; it is close to the best from 1 to 2048 rows (measured on Zen 3)."""


class Linear(Protocol):
    """y = x @ weight.T + bias."""

    def apply(self, x: Tensor) -> Tensor:
        """x: [n, in] -> [n, out]."""
        ...


def linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """A layer over weight [out, in]; the caller must not need `weight` to be kept if it is packed."""
    return PackedLinear(weight, bias) if _packable(weight) else PlainLinear(weight, bias)


@dataclass(frozen=True)
class PlainLinear:
    """The weight as it is; any device, any type."""

    weight: Tensor
    bias: Tensor | None

    def apply(self, x: Tensor) -> Tensor:
        """See Linear."""
        return F.linear(x, self.weight, self.bias)


class PackedLinear:
    """The weight in oneDNN's blocked layout: up to twice as fast for few rows, equal for many.

    A row's bits do not depend on the other rows (measured from 1 to 512 rows, fp32, AVX2).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, TYPICAL_ROWS)
        self._bias = bias

    def apply(self, x: Tensor) -> Tensor:
        """See Linear."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return out


def _packable(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or weight.numel() < MIN_PACKED_ELEMENTS:
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
