"""Linear layers, with their weights in the layout that is fastest where they run."""

import functools
import logging
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_PACKED_ELEMENTS = 1 << 22
"""oneDNN needs about 25 µs per call more than the plain product, which only large weights earn back."""

TYPICAL_ROWS = 512
"""For which oneDNN chooses the layout; it is close to the best from 1 to 2048 rows (measured on Zen 3)."""


TRIED_ROWS = (4, 5, 16, 33, 64, 130)

logger = logging.getLogger(__name__)


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

    A row's bits must not depend on the other rows. That holds for oneDNN 3.12 (torch 2.13, fp32, AVX2, from 1
    to 512 rows) but not for 3.10 (torch 2.11), so it is tried before the first weight is packed.
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
    if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    return weight.dtype in (torch.float32, torch.bfloat16) and packed_rows_are_independent(weight.dtype)


@functools.cache
def packed_rows_are_independent(dtype: torch.dtype) -> bool:
    """Whether this oneDNN on this processor gives a row the same bits whatever rows are beside it."""
    noise = torch.Generator().manual_seed(0)
    layer = PackedLinear(torch.randn(640, 320, generator=noise).to(dtype), None)
    x = torch.randn(max(TRIED_ROWS), 320, generator=noise).to(dtype)
    together = layer.apply(x)
    independent = all(torch.equal(layer.apply(x[:rows]), together[:rows]) for rows in TRIED_ROWS)
    if not independent:
        logger.warning("oneDNN's packed products depend on the batch here: weights stay as they are")
    return independent
