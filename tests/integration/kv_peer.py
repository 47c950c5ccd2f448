"""The sender's process of the tests with two processes. Talks to its parent over a multiprocessing pipe."""

import os
import threading

import torch

from kvtransfer.offers import gpu_id
from kvtransfer.transports.cuda_ipc import CudaSharing
from kvtransfer.transports.gloo import GlooTransport
from kvtransfer.transports.mapped import MappedTransport
from kvtransfer.transports.nccl import NcclTransport
from kvtransfer.transports.shm import HostSharing
from tests.integration.kv_services import SLAB_BYTES, WELCOME, SenderService, slabs_of


def rendezvous(pipe):
    """Exchange of addresses over the pipe."""

    def exchange(blob):
        pipe.send(blob)
        if not pipe.poll(5):
            raise TimeoutError("no address came")
        return pipe.recv()

    return exchange


def open_gloo(rank, exchange, timeout_s):
    return GlooTransport.open(rank, exchange, slabs_of(rank), timeout_s=timeout_s)


def open_shm(rank, exchange, timeout_s):
    sharing = HostSharing()
    return MappedTransport.open(rank, exchange, sharing, WELCOME.num_slabs, SLAB_BYTES, timeout_s=timeout_s)


def open_cuda_ipc(rank, exchange, timeout_s):
    sharing = CudaSharing(GPU)
    return MappedTransport.open(rank, exchange, sharing, WELCOME.num_slabs, SLAB_BYTES, timeout_s=timeout_s)


def open_nccl(rank, exchange, timeout_s):
    slabs = [slab.to(GPU) for slab in slabs_of(rank)]
    return NcclTransport.open(rank, exchange, slabs, gpu_id(GPU), timeout_s=timeout_s)


OPENERS = {"gloo": open_gloo, "shm": open_shm, "cuda_ipc": open_cuda_ipc, "nccl": open_nccl}
GPU = torch.device("cuda", 0)


def run_sender(pipe, timeout_s, transport_name="gloo"):
    """A prefill worker's links, one after another; ends when the pipe does."""
    torch.set_num_threads(1)
    pipe.send("ready")
    service = None
    send_lock = threading.Lock()

    def post(message):
        with send_lock:
            pipe.send(("message", message))

    while True:
        try:
            kind, value = pipe.recv()
        except EOFError:
            os._exit(0)
        if kind == "open":
            transport = OPENERS[transport_name](0, rendezvous(pipe), timeout_s)
            service = SenderService(transport, post)
            service.pump.start()
        elif kind == "message":
            service.pump.on_message(value)
        elif kind == "transfer":
            service.transfer(*value)
        elif kind == "pool":
            post(service.pool.cpu())


def send_one_large_message(pipe, num_bytes):
    """Sends without end of the message in sight, so that a kill hits it in the middle."""
    pipe.send("ready")
    transport = GlooTransport.open(0, rendezvous(pipe), [], timeout_s=5.0)
    transport.start_send(torch.ones(num_bytes, dtype=torch.uint8)).wait()


def receive_one_large_message(pipe, num_bytes):
    """The other direction."""
    pipe.send("ready")
    transport = GlooTransport.open(0, rendezvous(pipe), [], timeout_s=5.0)
    transport.recv(torch.zeros(num_bytes, dtype=torch.uint8))
