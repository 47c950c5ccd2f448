"""Opens the transport that a link's handshake has chosen; addresses travel over the control stream."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.engine import Engine
from kvtransfer.errors import TransportBroken
from kvtransfer.messages import Welcome
from kvtransfer.offers import ON_GPUS, Transports, gpu_id
from kvtransfer.plan import MAX_SLAB_BYTES
from kvtransfer.transport import NUM_SENDER_SLABS, NUM_SLABS, Transport, make_slabs
from kvtransfer.transports.cuda_ipc import CudaSharing
from kvtransfer.transports.gloo import GlooTransport
from kvtransfer.transports.mapped import MappedTransport
from kvtransfer.transports.nccl import NcclTransport
from kvtransfer.transports.shm import HostSharing
from runtime import faultpoints
from runtime.errors import Mismatch
from runtime.settings import WorkerSettings
from worker.control_stream import ControlStream
from worker.pointed import PointedTransport

NUM_COUNTED_LINKS = 4
"""Links whose slabs are counted when the pool is sized: how many will be made is not known then. Those of
others, and what NCCL takes for itself, come out of what `--gpu-memory-utilization` leaves."""


@dataclass(frozen=True, kw_only=True)
class Opening:
    """One end of one epoch, before its transport."""

    rank: int
    """0 sends."""
    welcome: Welcome
    exchange: Callable[[bytes], bytes]
    """Swaps a message with the peer; blocks, so never on the event loop."""
    hostname: str
    """Address for sockets."""
    device: torch.device
    """Of slabs that need not lie on the host."""

    @property
    def slab_bytes(self) -> int:
        """Of the largest frame."""
        return self.welcome.frame_sizes[0]

    @property
    def num_own_slabs(self) -> int:
        """Of this end, where each end has its own."""
        return self.welcome.num_slabs if self.rank else NUM_SENDER_SLABS


def usable_transports(settings: WorkerSettings, engine: Engine) -> Transports:
    """What this worker can use. StartupError if that is not what was asked for.

    The ranks of a tensor-parallel worker put their slabs together on the host.
    """
    device = engine.kv_cache.groups[0].device
    if settings.tensor_parallel_size > 1:
        device = torch.device("cpu")
    return Transports.of(settings.transport, device)


def link_memory_bytes(settings: WorkerSettings, device: str) -> int:
    """GPU memory that the KV links of a worker will take for slabs."""
    if torch.device(device).type == "cpu" or settings.tensor_parallel_size > 1:
        return 0
    wanted = ON_GPUS if settings.transport == "auto" else (settings.transport,)
    largest = max((MAX_SLAB_BYTES[name] for name in wanted if name in ON_GPUS), default=0)
    return NUM_COUNTED_LINKS * NUM_SLABS * largest


async def open_transport(
    welcome: Welcome, rank: int, stream: ControlStream, settings: WorkerSettings, device: torch.device
) -> Transport:
    """Build this end of the chosen transport. Raises TransportBroken."""
    opener = OPENERS.get(welcome.transport)
    if opener is None:
        raise Mismatch(f"transport {welcome.transport!r} is not known here")
    opening = Opening(
        rank=rank,
        welcome=welcome,
        exchange=stream.swap_from_thread,
        hostname=settings.kv_interface_host or settings.host,
        device=device,
    )
    try:
        transport = await asyncio.to_thread(opener, opening)
    except TimeoutError:
        raise
    except (OSError, RuntimeError) as error:  # no memory, no descriptors, a GPU's error
        raise TransportBroken(f"{welcome.transport} cannot be opened: {error}") from error
    return PointedTransport(transport) if faultpoints.ACTIVE else transport


def _open_gloo(opening: Opening) -> Transport:
    slabs = make_slabs(opening.num_own_slabs, opening.slab_bytes)
    return GlooTransport.open(opening.rank, opening.exchange, slabs, hostname=opening.hostname)


def _open_shm(opening: Opening) -> Transport:
    return MappedTransport.open(
        opening.rank, opening.exchange, HostSharing(), opening.welcome.num_slabs, opening.slab_bytes
    )


def _open_cuda_ipc(opening: Opening) -> Transport:
    sharing = CudaSharing(opening.device)
    return MappedTransport.open(
        opening.rank, opening.exchange, sharing, opening.welcome.num_slabs, opening.slab_bytes
    )


def _open_nccl(opening: Opening) -> Transport:
    slabs = make_slabs(opening.num_own_slabs, opening.slab_bytes, opening.device)
    return NcclTransport.open(opening.rank, opening.exchange, slabs, gpu_id(opening.device))


OPENERS: dict[str, Callable[[Opening], Transport]] = {
    "gloo": _open_gloo,
    "shm": _open_shm,
    "cuda_ipc": _open_cuda_ipc,
    "nccl": _open_nccl,
}
