"""Memory that two processes of one user on one host both see, without a name in any directory.

It is a memfd. The creator shows its peer a process id and a file descriptor, which the peer opens through
/proc; the kernel lets only the same user do that, who can read the process's memory anyway. Once both have
it mapped the descriptor is closed; with the last mapping the memory is gone, also when both ends were killed.
Sealed, it cannot shrink under its reader. Another process id namespace may show another process under that
number: so the memory begins with a nonce which the creator names too.
"""

import fcntl
import mmap
import os
import secrets
import struct

import torch

NONCE_BYTES = 16
ADDRESS = struct.Struct(f"!II{NONCE_BYTES}s")
"""Process id, file descriptor, nonce."""

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

AVAILABLE = hasattr(os, "memfd_create")


class SegmentRefused(Exception):
    """What an address names is not the memory that it claims to be, or not within reach."""


class Segment:
    """A page with the nonce, then the payload; the mapping lives as long as a view of the payload."""

    def __init__(self, handle: int, nonce: bytes, num_bytes: int) -> None:
        self._handle = handle
        self._nonce = nonce
        mapping = mmap.mmap(handle, mmap.PAGESIZE + num_bytes)
        self._header = memoryview(mapping)[:NONCE_BYTES]
        self.payload = torch.frombuffer(mapping, dtype=torch.uint8)[mmap.PAGESIZE :]
        """uint8 [num_bytes], zeros at first."""

    @classmethod
    def create(cls, num_bytes: int) -> "Segment":
        """Fresh memory. Raises OSError if there is none left."""
        handle = os.memfd_create("tandem-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(handle, 0, mmap.PAGESIZE + num_bytes)
            fcntl.fcntl(handle, fcntl.F_ADD_SEALS, SEALS)
            segment = cls(handle, secrets.token_bytes(NONCE_BYTES), num_bytes)
        except BaseException:
            os.close(handle)
            raise
        segment._header[:] = segment._nonce
        return segment

    @classmethod
    def open(cls, address: bytes, num_bytes: int) -> "Segment":
        """Another process's memory of `num_bytes` payload. Raises SegmentRefused."""
        try:
            pid, number, nonce = ADDRESS.unpack(address)
            handle = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, struct.error) as error:
            raise SegmentRefused(f"the peer's memory is out of reach: {error}") from error
        try:
            return cls._checked(handle, nonce, num_bytes)
        except (OSError, ValueError) as error:
            raise SegmentRefused(f"the peer's memory cannot be mapped: {error}") from error
        finally:
            os.close(handle)

    @classmethod
    def _checked(cls, handle: int, nonce: bytes, num_bytes: int) -> "Segment":
        if fcntl.fcntl(handle, fcntl.F_GET_SEALS) & SEALS != SEALS:
            raise SegmentRefused("the peer's memory could shrink")
        if os.fstat(handle).st_size != mmap.PAGESIZE + num_bytes:
            raise SegmentRefused(f"the peer's memory has not {num_bytes} bytes")
        segment = cls(handle, nonce, num_bytes)
        if bytes(segment._header) != nonce:
            raise SegmentRefused("this is another process's memory")
        return segment

    @property
    def address(self) -> bytes:
        """What `open` in another process takes; good until `hide`."""
        return ADDRESS.pack(os.getpid(), self._handle, self._nonce)

    def hide(self) -> None:
        """The address is no longer good; for its creator, once."""
        os.close(self._handle)
