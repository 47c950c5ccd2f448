"""What the rows of one process share: the device, the size, and the ceilings that floors are made of."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from benchmarks.gpu_rows.floors import SHAPES, Shape, tiny
from benchmarks.gpu_rows.row import Measured

T = TypeVar("T")
RowFunctions = Mapping[str, Callable[[], Measured]]
"""By the row's name."""

READ, COPY, MATRIX, GAP = (
    "read bandwidth",
    "copy bandwidth",
    "bf16 matrix product",
    "empty kernel in a graph",
)
SCALES = {READ: 1e9, COPY: 1e9, MATRIX: 1e12}
"""From the unit of such a row to bytes and operations per second."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where and how large."""

    section: str
    device: torch.device
    rehearsal: bool
    """Everything is tiny, and no number means anything."""
    ceilings: Mapping[str, float] = field(default_factory=dict)
    """Values of the rows READ, COPY and MATRIX of this run, as far as they were measured."""

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and KV."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def pick(self, full: T, small: T) -> T:
        """By the size of the run."""
        return small if self.rehearsal else full

    def shape(self, name: str) -> Shape:
        """One of SHAPES."""
        return self.pick(SHAPES[name], tiny(SHAPES[name]))

    def floor_s(self, **needs: float) -> float | None:
        """Seconds for what is needed: `read` and `copied` bytes (those written count as well), `flops`.

        They overlap, so that the longest counts. None: a ceiling is missing.
        """
        names = {"read": READ, "copied": COPY, "flops": MATRIX}
        if any(names[kind] not in self.ceilings for kind in needs):
            return None
        return max(
            amount / (self.ceilings[names[kind]] * SCALES[names[kind]]) for kind, amount in needs.items()
        )

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def scaled(seconds: float | None, factor: float) -> float | None:
    """A floor in another unit."""
    return None if seconds is None else seconds * factor
