"""What rank 0 tells the others: an operation, arrays of integers, perhaps raw bytes, over a socket pair.

Both ends are processes of one worker on one machine, so numbers are in its byte order. The end of either
process closes its socket, which the other one notices at once.
"""

import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum, unique
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.models.inputs import FinalRows
from engine.parallel.errors import RankLost
from kernels.attention import AttentionBatch

HEAD = struct.Struct("=qqq")
"""Operation, number of arrays, bytes of the payload."""

NUM_FORWARD_ARRAYS = 7
"""Of a forward pass that computes all rows to the end."""

Ints = NDArray[np.int64]


@unique
class Op(IntEnum):
    """What to do; arrays and payload in brackets."""

    START = 1
    """Load a shard [a `Start` as JSON]. Answered by READY."""
    READY = 2
    """The shard is loaded."""
    ALLOCATE = 3
    """Make the pool [blocks, blocks on the host]."""
    FORWARD = 4
    """Compute the batch [`Inputs.arrays`]."""
    LOGITS = 5
    """Take hidden states by broadcast [rows, hidden size] and compute their logits."""
    COPY = 6
    """Copy blocks [source ids, target ids]."""
    STORE = 7
    """Blocks to the host [block ids, slots]."""
    LOAD = 8
    """Blocks from the host [slots, block ids]."""
    RECORD_STEPS = 9
    """Record steps over the pool, while all ranks do [`StepSpec.arrays`]."""
    STEP = 10
    """Run one [(requests, width); payload of `StepInputs.fill`]."""
    CHANGE_TABLES = 11
    """Change block tables of the steps [; payload of `StepInputs.fill`]."""
    ROLL = 12
    """Answered by PRESENT."""
    PRESENT = 13
    """Whoever computes here listens."""
    SCATTER = 14
    """A frame's stripes to blocks [(link, slab, first layer, layers), block ids]. Answered by SCATTERED."""
    SCATTERED = 15
    """The stripes' [lanes, checksums]; empty if the link has ended."""
    LINK = 16
    """Serve a KV link [(number)]; its channel's end follows, over which all that comes behind goes."""
    OPEN = 17
    """Open a lane [an `Opening` as JSON]. Answered by OPENED, perhaps behind EXCHANGEs."""
    EXCHANGE = 18
    """Swap a message with the lane's other end [; the message]. Answered by EXCHANGE."""
    OPENED = 19
    """The lane is open."""
    GATHER = 20
    """Blocks to slabs [(slab, first layer, layers), block ids]. Answered by GATHERED."""
    GATHERED = 21
    """The stripes' [lanes, checksums]."""
    SEND = 22
    """Begin to send what was gathered [(slab, size index)]."""
    WAIT = 23
    """Wait until the oldest send has left. Answered by SENT."""
    SENT = 24
    """It has."""
    RECV = 25
    """Receive into slabs [(slab, size index)]. Answered by RECEIVED."""
    RECEIVED = 26
    """The slabs are filled."""
    FAILED = 27
    """The link's lanes on this rank are closed [; why, as text]."""
    MEASURE = 28
    """Look at the device's memory. Answered by MEASURED."""
    MEASURED = 29
    """[(free bytes)]."""


@dataclass(frozen=True)
class Message:
    """One message."""

    op: Op
    arrays: list[Ints]
    payload: bytearray

    @property
    def lists(self) -> list[list[int]]:
        """The arrays."""
        return [array.tolist() for array in self.arrays]


def encode(op: Op, *arrays: Sequence[int] | Ints, num_payload_bytes: int = 0) -> bytes:
    """A message up to its payload, which follows as it is."""
    ints = [np.asarray(array, dtype=np.int64) for array in arrays]
    lens = np.array([len(array) for array in ints], dtype=np.int64)
    head = HEAD.pack(op, len(ints), num_payload_bytes)
    return b"".join((head, lens.tobytes(), *(array.tobytes() for array in ints)))


def raw(payload: Tensor) -> memoryview:
    """The bytes of a flat uint8 tensor, as `Channel.send` takes them."""
    return memoryview(payload.cpu().numpy())  # type: ignore[arg-type]


class Channel:
    """One end of a socket pair; a silence within a message, or before one if `timeout_s`, is a lost rank."""

    def __init__(self, end: socket.socket, peer: str, timeout_s: float | None) -> None:
        self._socket = end
        self._peer = peer
        end.settimeout(timeout_s)

    def send(self, *pieces: bytes | memoryview) -> None:
        """Send an encoded message and its payload."""
        try:
            for piece in pieces:
                self._socket.sendall(piece)
        except OSError as error:
            raise RankLost(f"{self._peer} does not listen ({error})") from error

    def receive(self) -> Message | None:
        """The next message; None if the peer is gone."""
        head = self._read(HEAD.size)
        if not head:
            return None
        op, num_arrays, num_payload_bytes = HEAD.unpack(head)
        lens = np.frombuffer(self._read(8 * num_arrays), dtype=np.int64)
        data = np.frombuffer(self._read(8 * int(lens.sum())), dtype=np.int64)
        arrays = np.split(data, np.cumsum(lens)[:-1]) if num_arrays else []
        return Message(Op(op), arrays, self._read(num_payload_bytes))

    def expect(self, op: Op) -> Message:
        """The next message, which is of this kind."""
        message = self.receive()
        if message is None:
            raise RankLost(f"{self._peer} has ended")
        assert message.op is op, message.op
        return message

    def send_socket(self, end: socket.socket) -> None:
        """Hand a socket to the other process, behind the messages so far."""
        try:
            socket.send_fds(self._socket, [b"\0"], [end.fileno()])
        except OSError as error:
            raise RankLost(f"{self._peer} does not listen ({error})") from error

    def receive_socket(self) -> socket.socket:
        """What `send_socket` sent. RankLost if the peer is gone."""
        _, fds, _, _ = socket.recv_fds(self._socket, 1, 1)
        if not fds:
            raise RankLost(f"{self._peer} has ended")
        return socket.socket(fileno=fds[0])

    def shut(self) -> None:
        """Both ends see the end of the stream; for any thread, while another one receives."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def set_timeout(self, timeout_s: float | None) -> None:
        """Change how long a silence may last."""
        self._socket.settimeout(timeout_s)

    def close(self) -> None:
        """The other end sees the end of the stream."""
        self._socket.close()

    def _read(self, num_bytes: int) -> bytearray:
        """So many bytes; nothing if the peer is gone."""
        data = bytearray(num_bytes)
        view = memoryview(data)
        try:
            while view:
                count = self._socket.recv_into(view)
                if count == 0:
                    return bytearray()
                view = view[count:]
        except TimeoutError as error:
            raise RankLost(f"{self._peer} does not answer") from error
        except OSError:
            return bytearray()
        return data


class Inputs(NamedTuple):
    """What a forward pass takes beside the KV pool; see engine.models.llama.Llama.forward."""

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    attention: AttentionBatch
    final: FinalRows | None

    def arrays(self) -> list[Sequence[int] | Ints]:
        """As they travel."""
        tensors = (self.token_ids, self.positions, self.slot_mapping)
        arrays = [tensor.cpu().numpy() for tensor in tensors]
        found = [*arrays, *_attention_arrays(self.attention)]
        if self.final is not None:
            found += [self.final.rows.cpu().numpy(), *_attention_arrays(self.final.attention)]
        return found

    @classmethod
    def of(cls, arrays: Sequence[Ints], block_size: int, device: torch.device) -> "Inputs":
        """The same on another rank's device."""
        token_ids, positions, slot_mapping = (torch.tensor(array, device=device) for array in arrays[:3])
        attention = _to_attention(arrays[3:7], block_size, device)
        final = None
        if len(arrays) > NUM_FORWARD_ARRAYS:
            rows = torch.tensor(arrays[NUM_FORWARD_ARRAYS], device=device)
            own = _to_attention(arrays[NUM_FORWARD_ARRAYS + 1 :], block_size, device)
            final = FinalRows(rows=rows, attention=own)
        return cls(token_ids, positions, slot_mapping, attention, final)


def _attention_arrays(attention: AttentionBatch) -> list[Sequence[int] | Ints]:
    """Without the blocks behind the contexts."""
    lens = [-(-context_len // attention.block_size) for context_len in attention.context_lens]
    tables = zip(attention.block_tables, lens, strict=True)
    block_ids = list(chain.from_iterable(table[:count] for table, count in tables))
    return [attention.query_lens, attention.context_lens, lens, block_ids]


def _to_attention(arrays: Sequence[Ints], block_size: int, device: torch.device) -> AttentionBatch:
    query_lens, context_lens, lens, block_ids = (array.tolist() for array in arrays)
    ends = list(accumulate(lens))
    return AttentionBatch(
        query_lens=query_lens,
        context_lens=context_lens,
        block_tables=[block_ids[end - count : end] for end, count in zip(ends, lens, strict=True)],
        block_size=block_size,
        device=device,
    )
