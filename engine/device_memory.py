"""How much memory a device has left, and what a piece of work takes of it."""

import os
from collections.abc import Callable
from typing import Protocol

import torch


class Meter(Protocol):
    """Looks at one device's memory."""

    def peak_bytes(self, run: Callable[[], None]) -> int:
        """Most that `run` took on top of what was taken before."""
        ...

    def free_bytes(self) -> int:
        """Free now, for this process and all others."""
        ...


class CudaMeter:
    """A GPU, by torch's allocator and the driver."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def peak_bytes(self, run: Callable[[], None]) -> int:
        """See Meter."""
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        run()
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - before

    def free_bytes(self) -> int:
        """See Meter."""
        return free_bytes(self._device)


def free_bytes(device: torch.device) -> int:
    """Free on a GPU, with what torch has in reserve given back; for a CPU, in the host's memory."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
