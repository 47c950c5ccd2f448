"""Named tensors at fixed places in device memory, filled from the host by one copy."""

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNMENT = 64
"""Bytes; kernels that are compiled for a place load wide from aligned ones."""

NUM_STAGES = 2
"""Host copies, used in turn, unless a caller wants more: one is filled while the other is on its way."""

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Type and shape of each tensor, in the order of their places."""


class StagedBuffers:
    """One piece of device memory and its twins on the host, pinned if the device is a GPU.

    The host writes `host`, then `send` starts the copy of all of it on the current stream. Whoever calls
    `send` more than `num_stages` times must have waited for the end of the first copy; `settle` does for all.
    """

    def __init__(self, layout: Layout, device: torch.device, num_stages: int = NUM_STAGES) -> None:
        self._ends = _ends(layout)
        num_bytes = max(self._ends.values())
        self._stages = [
            torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
            for _ in range(num_stages)
        ]
        self.hosts = [
            {name: each.numpy() for name, each in _views(stage, layout, self._ends).items()}
            for stage in self._stages
        ]
        """The twins, by name of the tensor."""
        self.turn = 0
        """Which twin is next; what it holds is what was sent a round of turns ago."""
        self._memory = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self.device = _views(self._memory, layout, self._ends)
        """What the kernels read, by name; always at the same addresses."""

    @property
    def host(self) -> dict[str, NDArray[np.generic]]:
        """The twin that is next."""
        return self.hosts[self.turn]

    def send(self) -> Tensor:
        """Copy the twin that is next, and turn to the next one.

        Returns the twin, uint8 on the host, valid until it is next again.
        """
        twin = self._stages[self.turn]
        self._memory.copy_(twin, non_blocking=True)
        self.turn = (self.turn + 1) % len(self._stages)
        return twin

    def send_raw(self, twin: Tensor) -> None:
        """`send` what another `StagedBuffers` of the same layout has sent."""
        self._stages[self.turn].copy_(twin)
        self.send()

    def settle(self) -> None:
        """Wait until every copy has arrived."""
        if self._memory.is_cuda:
            torch.cuda.current_stream(self._memory.device).synchronize()


def _num_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * dtype.itemsize


def _ends(layout: Layout) -> dict[str, int]:
    """Where each tensor ends, in bytes; each begins at a multiple of ALIGNMENT."""
    ends: dict[str, int] = {}
    end = 0
    for name, (dtype, shape) in layout.items():
        start = -(-end // ALIGNMENT) * ALIGNMENT
        end = ends[name] = start + _num_bytes(dtype, shape)
    return ends


def _views(memory: Tensor, layout: Layout, ends: Mapping[str, int]) -> dict[str, Tensor]:
    return {
        name: memory[ends[name] - _num_bytes(dtype, shape) : ends[name]].view(dtype).view(shape)
        for name, (dtype, shape) in layout.items()
    }
