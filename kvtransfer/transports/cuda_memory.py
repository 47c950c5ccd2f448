"""GPU memory that another process on the same GPU can map, through the CUDA driver.

torch's own way (`UntypedStorage._share_cuda_`) keeps a counter file in /dev/shm, which stays when its process
is killed, and shares whatever segment of the caching allocator the tensor lies in. Here the memory is an
allocation of its own, and its handle 64 bytes that a control message carries.
"""

import ctypes
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvtransfer.errors import TransportBroken

HANDLE_BYTES = 64

LAZY_PEER_ACCESS = 1
"""CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS: the one flag that there is."""

GRACE_S = 10.0
"""After the end of its use an allocation stays so long: the other process must have let go of it before, and
that takes a link's timeout and a step of its engine."""

POINTER = ctypes.c_uint64


class Handle(ctypes.Structure):
    """CUipcMemHandle; passed by value."""

    _fields_ = [("reserved", ctypes.c_char * HANDLE_BYTES)]  # ctypes wants this very form


class _Allocation:
    """What torch needs to see a piece of GPU memory as a tensor without copying it."""

    def __init__(self, pointer: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (pointer, False),
            "version": 3,
        }


class CudaMemory:
    """The driver's calls for one GPU, whose primary context is torch's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._driver.cuMemAlloc_v2.argtypes = [ctypes.POINTER(POINTER), ctypes.c_size_t]
        self._driver.cuMemFree_v2.argtypes = [POINTER]
        self._driver.cuIpcGetMemHandle.argtypes = [ctypes.POINTER(Handle), POINTER]
        self._driver.cuIpcOpenMemHandle_v2.argtypes = [ctypes.POINTER(POINTER), Handle, ctypes.c_uint]
        self._driver.cuIpcCloseMemHandle.argtypes = [POINTER]

    def allocate(self, num_bytes: int) -> tuple[Tensor, bytes]:
        """(uint8 [num_bytes], its handle). Raises TransportBroken."""
        pointer, handle = POINTER(), Handle()
        self._enter()
        self._call("cuMemAlloc_v2", ctypes.byref(pointer), num_bytes)
        memory = self._tensor(pointer.value, num_bytes, self._free_later)
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), pointer)
        return memory, ctypes.string_at(ctypes.addressof(handle), HANDLE_BYTES)

    def open(self, handle: bytes, num_bytes: int) -> Tensor:
        """Another process's allocation of that size. Raises TransportBroken."""
        pointer = POINTER()
        self._enter()
        opened = Handle.from_buffer_copy(handle)
        self._call("cuIpcOpenMemHandle_v2", ctypes.byref(pointer), opened, LAZY_PEER_ACCESS)
        return self._tensor(pointer.value, num_bytes, self._close)

    def _enter(self) -> None:
        """The driver works on the calling thread's context: torch's."""
        torch.cuda.set_device(self._device)
        torch.cuda.synchronize(self._device)

    def _tensor(self, pointer: int, num_bytes: int, release: Callable[[int], None]) -> Tensor:
        """A tensor that gives its memory back behind its last view."""
        allocation = _Allocation(pointer, num_bytes)
        weakref.finalize(allocation, release, pointer).atexit = False
        return torch.as_tensor(allocation, device=self._device)

    def _free_later(self, pointer: int) -> None:
        timer = threading.Timer(GRACE_S, self._release, ("cuMemFree_v2", pointer))
        timer.daemon = True
        timer.start()

    def _close(self, pointer: int) -> None:
        self._release("cuIpcCloseMemHandle", pointer)

    def _release(self, function: str, pointer: int) -> None:
        self._enter()
        getattr(self._driver, function)(pointer)

    def _call(self, function: str, *arguments: Any) -> None:
        code = getattr(self._driver, function)(*arguments)
        if code:
            raise TransportBroken(f"{function} failed with CUDA error {code}")
