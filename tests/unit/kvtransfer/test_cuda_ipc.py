"""Slabs in GPU memory, with host memory and fake events in its place."""

from typing import Any

import pytest
import torch

from kvtransfer.errors import TransportBroken
from kvtransfer.offers import Transports
from kvtransfer.transports import cuda_ipc
from kvtransfer.transports.cuda_ipc import EVENT_BYTES, CudaSharing
from kvtransfer.transports.mapped import MappedTransport
from kvtransfer.transports.polling import Poll
from runtime.clock import ManualClock

CPU = torch.device("cpu")


class Gpu:
    """Memory and events of one GPU, by their handles; `stream` is the number of writes still queued."""

    def __init__(self):
        self.memory: dict[bytes, torch.Tensor] = {}
        self.events: dict[bytes, Any] = {}
        self.queued = 0

    def allocate(self, num_bytes):
        handle = f"memory {len(self.memory)}".encode().ljust(cuda_ipc.HANDLE_BYTES)
        self.memory[handle] = torch.zeros(num_bytes, dtype=torch.uint8)
        return self.memory[handle], handle

    def open(self, handle, num_bytes):
        if handle not in self.memory:
            raise TransportBroken("cuIpcOpenMemHandle_v2 failed with CUDA error 1")
        assert self.memory[handle].numel() == num_bytes
        return self.memory[handle]

    def sharing(self):
        return CudaSharing(
            CPU,
            memory=lambda device: self,
            new_event=lambda: FakeEvent(self),
            open_event=lambda device, handle: self.events[handle],
            stream=lambda device: self,
        )


class FakeEvent:
    """Behind what is queued when it is recorded."""

    def __init__(self, gpu):
        self.gpu = gpu
        self.recorded = None

    def record(self, stream):
        assert stream is self.gpu
        self.recorded = self.gpu.queued

    def query(self):
        return self.recorded is not None and self.gpu.queued < max(self.recorded, 1)

    def ipc_handle(self):
        assert self.recorded is not None, "an event gets its GPU when it is recorded"
        handle = f"event {len(self.gpu.events)}".encode().ljust(EVENT_BYTES)
        self.gpu.events[handle] = self
        return handle


@pytest.fixture
def gpu():
    return Gpu()


def ends(gpu, on_pause=lambda: None):
    clock = ManualClock()

    def pause(seconds):
        clock.advance(seconds)
        on_pause()

    exported = gpu.sharing().export(2, 64)
    opened = gpu.sharing().open(exported.address, 2, 64)
    return [MappedTransport(memory, Poll(0.01, clock=clock, pause=pause)) for memory in (exported, opened)]


def test_both_ends_see_the_same_memory(gpu):
    sender, receiver = ends(gpu)
    for number in (0, 1):
        sender.slabs[number].fill_(number + 1)
        assert (receiver.slabs[number] == number + 1).all()


def test_a_slab_is_read_behind_what_writes_it(gpu):
    looks = []

    def work():
        looks.append(gpu.queued)
        gpu.queued -= 1

    sender, receiver = ends(gpu, work)
    gpu.queued = 3
    sender.start_send(sender.slabs[0]).wait()
    gpu.queued = 5  # the next frame is queued behind it
    receiver.recv(receiver.slabs[0])
    assert looks == [5, 4, 3]


def test_a_writer_whose_gpu_hangs_costs_one_timeout(gpu):
    sender, receiver = ends(gpu)
    gpu.queued = 1
    sender.start_send(sender.slabs[0])
    with pytest.raises(TransportBroken, match="no progress"):
        receiver.recv(receiver.slabs[0])


def test_close_ends_the_wait(gpu):
    made = []
    made = ends(gpu, lambda: made[1].close())
    gpu.queued = 1
    made[0].start_send(made[0].slabs[0])
    with pytest.raises(TransportBroken, match="closed"):
        made[1].recv(made[1].slabs[0])


def test_handles_that_are_none_are_refused(gpu):
    address = gpu.sharing().export(2, 64).address
    for bad in (b"", address[:-1], address + b"x"):
        with pytest.raises(TransportBroken, match="no handles of 2 slabs"):
            gpu.sharing().open(bad, 2, 64)
    with pytest.raises(TransportBroken, match="cuIpcOpenMemHandle"):
        gpu.sharing().open(b"x" * cuda_ipc.HANDLE_BYTES + address[cuda_ipc.HANDLE_BYTES :], 2, 64)


def test_one_gpu_is_known_by_its_id(monkeypatch):
    monkeypatch.setattr("kvtransfer.offers.gpu_id", lambda device: f"gpu {device.index}".encode())
    one, same, other = (Transports.of("auto", torch.device("cuda", index)) for index in (0, 0, 1))
    assert one.names == ("cuda_ipc", "nccl", "shm", "gloo")
    with one.proofs() as proofs:
        offered = dict(zip(one.names, proofs, strict=True))
        assert same.refusal("cuda_ipc", offered["cuda_ipc"]) is None
        assert other.refusal("cuda_ipc", offered["cuda_ipc"]) == "the two workers are on different GPUs"
        assert other.refusal("nccl", offered["nccl"]) is None
    on_host = Transports.of("auto", CPU)
    assert on_host.refusal("nccl", b"") == "this worker uses shm, gloo"
    assert Transports.of("nccl", torch.device("cuda", 0)).names == ("nccl",)
    ranks = Transports.of("auto", torch.device("cuda", 0), num_ranks=2)
    assert ranks.names == ("nccl", "shm", "gloo")
    assert ranks.refusal("cuda_ipc", offered["cuda_ipc"]) == "this worker uses nccl, shm, gloo"
