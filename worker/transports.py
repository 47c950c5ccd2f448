"""Which transports a worker offers for its KV links, and what they will take of its GPUs."""

import torch

from engine.engine import Engine
from kvtransfer.offers import ON_GPUS, Transports
from kvtransfer.plan import MAX_SLAB_BYTES
from kvtransfer.transport import NUM_SLABS
from runtime.settings import WorkerSettings

NUM_COUNTED_LINKS = 4
"""Links whose slabs are counted when the pool is sized: how many will be made is not known then. Those of
others, and what NCCL takes for itself, come out of what `--gpu-memory-utilization` leaves."""


def usable_transports(settings: WorkerSettings, engine: Engine) -> Transports:
    """What this worker can use. StartupError if that is not what was asked for."""
    device = engine.kv_cache.groups[0].device
    return Transports.of(settings.transport, device, num_ranks=settings.tensor_parallel_size)


def link_memory_bytes(settings: WorkerSettings, device: str) -> int:
    """Memory that the KV links of a worker will take for slabs of each rank's GPU, at most."""
    if torch.device(device).type == "cpu":
        return 0
    wanted = ON_GPUS if settings.transport == "auto" else (settings.transport,)
    largest = max((MAX_SLAB_BYTES[name] for name in wanted if name in ON_GPUS), default=0)
    return NUM_COUNTED_LINKS * NUM_SLABS * largest
