"""What every Triton kernel of ours is started with, as a value: the launchers build it, run it, and it can be
compiled for a GPU that is not there."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import triton
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter, on CPU tensors."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One kernel over one grid."""

    kernel: Any
    """A function under `triton.jit`."""
    grid: tuple[int, ...]
    args: Mapping[str, Tensor | float]
    """Run-time arguments by parameter name."""
    constexprs: Mapping[str, Any]
    """Compile-time arguments by parameter name."""
    num_warps: int = 4
    num_stages: int = 3

    def run(self) -> None:
        """Start it on the current stream."""
        self.kernel[self.grid](
            **self.args, **self.constexprs, num_warps=self.num_warps, num_stages=self.num_stages
        )
