"""Which transports a worker offers in its Hello, and which of those offered to it it can use.

A transport that works only between neighbours comes with a proof, and is taken only when the receiver has
tried it: `shm` shows memory that must open here, `cuda_ipc` names the GPU that must be the same. Host names
and addresses prove nothing. The order is the sender's, best first.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from kvtransfer.transports.segment import AVAILABLE, Segment, SegmentRefused
from runtime.errors import StartupError

logger = logging.getLogger(__name__)

ON_HOSTS = ("shm", "gloo")
ON_GPUS = ("cuda_ipc", "nccl")
RANKS_ON_GPUS = ("nccl",)
"""Of workers of several ranks, which are on as many GPUs: no other worker is on the same ones."""


@dataclass(frozen=True, kw_only=True)
class Transports:
    """What one worker can use; its slabs lie on `device`, or in host memory if the transport needs that."""

    names: tuple[str, ...]
    """Best first."""
    device: torch.device

    @classmethod
    def of(cls, setting: str, device: torch.device, num_ranks: int = 1) -> "Transports":
        """From `--transport`, the device of the KV pool, and how many ranks have a part of it.

        Raises StartupError if this worker cannot use the transport that was asked for.
        """
        on_gpus = ON_GPUS if num_ranks == 1 else RANKS_ON_GPUS
        usable = (*(on_gpus if device.type == "cuda" else ()), *ON_HOSTS[0 if AVAILABLE else 1 :])
        if setting == "auto":
            return cls(names=usable, device=device)
        if setting not in usable:
            raise StartupError(f"--transport {setting}: this worker can use {', '.join(usable)}")
        return cls(names=(setting,), device=device)

    def without(self, failed: set[str]) -> "Transports":
        """The same but for these; the last one stays in any case, for the next try may succeed."""
        *first, last = self.names
        return replace(self, names=(*(name for name in first if name not in failed), last))

    @contextmanager
    def proofs(self) -> Iterator[tuple[bytes, ...]]:
        """One for each name; good inside of the context. One that cannot be given is empty: it is refused."""
        probe = _probe() if "shm" in self.names else None
        shown = {"shm": probe.address if probe else b"", "cuda_ipc": gpu_id(self.device)}
        try:
            yield tuple(shown.get(name, b"") for name in self.names)
        finally:
            if probe is not None:
                probe.hide()

    def refusal(self, name: str, proof: bytes) -> str | None:
        """Why an offered transport cannot be used here; None if it can."""
        if name not in self.names:
            return f"this worker uses {', '.join(self.names)}"
        if name == "shm":
            return _segment_refusal(proof)
        if name == "cuda_ipc" and proof != gpu_id(self.device):
            return "the two workers are on different GPUs"
        return None


def gpu_id(device: torch.device) -> bytes:
    """The same in every process for one GPU; empty for a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid).encode() if device.type == "cuda" else b""


def _probe() -> Segment | None:
    try:
        return Segment.create(0)
    except OSError as error:
        logger.warning("no memory to share: %s", error)
        return None


def _segment_refusal(address: bytes) -> str | None:
    try:
        Segment.open(address, 0)
    except SegmentRefused as error:
        return str(error)
    return None
