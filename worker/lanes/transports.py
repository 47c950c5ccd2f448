"""Opens the transport of a lane, as chosen by its link's handshake; addresses go over the control stream."""

from collections.abc import Callable

import torch

from kvtransfer.errors import TransportBroken
from kvtransfer.lanes import RECEIVER
from kvtransfer.offers import gpu_id
from kvtransfer.transport import NUM_SENDER_SLABS, Transport, make_slabs
from kvtransfer.transports.cuda_ipc import CudaSharing
from kvtransfer.transports.gloo import GlooTransport
from kvtransfer.transports.mapped import MappedTransport
from kvtransfer.transports.nccl import NcclTransport
from kvtransfer.transports.shm import HostSharing
from runtime import faultpoints
from runtime.errors import Mismatch
from worker.lanes.opening import Opening
from worker.pointed import PointedTransport

Exchange = Callable[[bytes], bytes]
"""Swaps a message with the other end of a lane; blocks, so never on the event loop."""


def open_transport(opening: Opening, exchange: Exchange, device: torch.device) -> Transport:
    """Build this end of a lane's transport; blocks. Slabs that need not lie on the host lie on `device`.

    Raises TransportBroken, and Mismatch for a transport that is not known here.
    """
    opener = OPENERS.get(opening.transport)
    if opener is None:
        raise Mismatch(f"transport {opening.transport!r} is not known here")
    try:
        transport = opener(opening, exchange, device)
    except TimeoutError:
        raise
    except (OSError, RuntimeError) as error:  # no memory, no descriptors, a GPU's error
        raise TransportBroken(f"{opening.transport} cannot be opened: {error}") from error
    return PointedTransport(transport) if faultpoints.ACTIVE and not opening.lane.number else transport


def _num_own_slabs(opening: Opening) -> int:
    """Where each end has its own."""
    return opening.num_slabs if opening.end == RECEIVER else NUM_SENDER_SLABS


def _open_gloo(opening: Opening, exchange: Exchange, device: torch.device) -> Transport:
    slabs = make_slabs(_num_own_slabs(opening), opening.lane.slab_bytes)
    return GlooTransport.open(opening.end, exchange, slabs, hostname=opening.hostname)


def _open_shm(opening: Opening, exchange: Exchange, device: torch.device) -> Transport:
    sharing = HostSharing()
    return MappedTransport.open(opening.end, exchange, sharing, opening.num_slabs, opening.lane.slab_bytes)


def _open_cuda_ipc(opening: Opening, exchange: Exchange, device: torch.device) -> Transport:
    sharing = CudaSharing(device)
    return MappedTransport.open(opening.end, exchange, sharing, opening.num_slabs, opening.lane.slab_bytes)


def _open_nccl(opening: Opening, exchange: Exchange, device: torch.device) -> Transport:
    slabs = make_slabs(_num_own_slabs(opening), opening.lane.slab_bytes, device)
    return NcclTransport.open(opening.end, exchange, slabs, gpu_id(device))


OPENERS: dict[str, Callable[[Opening, Exchange, torch.device], Transport]] = {
    "gloo": _open_gloo,
    "shm": _open_shm,
    "cuda_ipc": _open_cuda_ipc,
    "nccl": _open_nccl,
}
