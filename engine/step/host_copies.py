"""What steps leave on the device, brought to the host while these go on."""

from collections.abc import Callable

import torch
from torch import Tensor


class HostCopies:
    """Twins of one tensor on the host, pinned if it lies on a GPU; used in turn."""

    def __init__(self, source: Tensor, num_copies: int) -> None:
        self._source = source
        on_gpu = source.device.type == "cuda"
        self._hosts = [torch.empty_like(source, device="cpu", pin_memory=on_gpu) for _ in range(num_copies)]
        self._events = [torch.cuda.Event() if on_gpu else None for _ in self._hosts]
        self._turn = 0

    def start(self) -> Callable[[], Tensor]:
        """Start a copy behind what the current stream does; the result waits for its end, and for nothing
        else, and is valid until `num_copies` others have been started."""
        host, event = self._hosts[self._turn], self._events[self._turn]
        self._turn = (self._turn + 1) % len(self._hosts)
        host.copy_(self._source, non_blocking=True)
        if event is not None:
            event.record()

        def arrived() -> Tensor:
            if event is not None:
                event.synchronize()
            return host

        return arrived
