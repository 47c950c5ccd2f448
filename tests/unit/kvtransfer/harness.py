"""A sender and a receiver joined by lossless queues; every step is one call: tests choose the order."""

import zlib
from collections import deque
from dataclasses import dataclass, field

from kvtransfer.actions import (
    Deliver,
    FrameToSend,
    IncomingFrame,
    PostReceive,
    Send,
    TransferCommitted,
)
from kvtransfer.layout import KvFacts, KvGroup, layer_block_bytes, num_blocks_of
from kvtransfer.messages import FirstToken, FrameHeader, Welcome
from kvtransfer.plan import Rectangle, rectangles
from kvtransfer.receiver import ReceiverLink
from kvtransfer.sender import SenderLink
from runtime.clock import ManualClock

FACTS = KvFacts(
    protocol_major=1,
    model_hash="m",
    tokenizer_hash="t",
    block_size=2,
    max_model_len=32,
    rope="",
    groups=(
        KvGroup(name="target", num_layers=3, num_kv_heads=1, head_dim=2, dtype="float16"),
        KvGroup(name="draft", num_layers=1, num_kv_heads=1, head_dim=1, dtype="float16"),
    ),
)
# The slab holds two cells of the larger group: its blocks are cut by layers.
WELCOME = Welcome(epoch=1, transport="local", frame_sizes=(40, 20, 10), num_slabs=2)
TOKEN = (FirstToken(choice=0, token_id=7),)
ONE_CELL = FrameHeader(
    ticket=1,
    sequence=0,
    group=0,
    first_block=0,
    num_blocks=1,
    first_layer=0,
    num_layers=1,
    size_index=0,
    checksum=0,
)
"""Announces a frame with one block in one layer."""


def cells_of(rectangle: Rectangle):
    return [
        (rectangle.group, block, layer)
        for layer in range(rectangle.first_layer, rectangle.first_layer + rectangle.num_layers)
        for block in range(rectangle.first_block, rectangle.first_block + rectangle.num_blocks)
    ]


def cell_bytes(transfer_id: bytes, cell: tuple[int, int, int]) -> bytes:
    """What the sender's pool holds; different in every cell of every transfer."""
    size = layer_block_bytes(FACTS.groups[cell[0]], FACTS.block_size)
    seed = zlib.crc32(transfer_id + repr(cell).encode())
    return b"".join(zlib.crc32(bytes([i]), seed).to_bytes(4) for i in range(size // 4 + 1))[:size]


def payload_of(frame: FrameToSend) -> bytes:
    return b"".join(cell_bytes(frame.transfer_id, cell) for cell in cells_of(frame.rectangle))


@dataclass
class Harness:
    """The queues and the two services around the links, without threads."""

    clock: ManualClock = field(default_factory=ManualClock)
    to_receiver: deque = field(default_factory=deque)
    to_sender: deque = field(default_factory=deque)
    # The wire: bytes in order; receives that were posted; frames given to the engine thread.
    wire: deque = field(default_factory=deque)
    posted: deque = field(default_factory=deque)
    delivered: deque = field(default_factory=deque)
    gathered: deque = field(default_factory=deque)
    on_wire: deque = field(default_factory=deque)
    sender_events: list = field(default_factory=list)
    receiver_events: list = field(default_factory=list)
    # Receiver's pool: cells written per transfer, and the offset of the expected blocks.
    pool: dict = field(default_factory=dict)
    corrupt_next: bool = False

    def __post_init__(self):
        self.sender = SenderLink(facts=FACTS, welcome=WELCOME, clock=self.clock)
        self.receiver = ReceiverLink(facts=FACTS, welcome=WELCOME, clock=self.clock)
        self.to_sender.append(self.receiver.initial_credit())

    def check(self):
        self.sender.check()
        self.receiver.check()
        # Each slab has exactly one credit, wherever it is just now.
        travelling = sum(m.slabs for m in self.to_sender if type(m).__name__ == "Credit")
        headers = sum(type(m).__name__ == "FrameHeader" for m in self.to_receiver)
        credits = self.sender._credits
        owned = WELCOME.num_slabs - self.receiver.num_free_slabs
        assert credits + travelling + len(self.gathered) + headers + owned == WELCOME.num_slabs

    def sender_does(self, actions):
        for action in actions:
            if isinstance(action, Send):
                self.to_receiver.append(action.message)
            else:
                self.sender_events.append(action)

    def receiver_does(self, actions):
        for action in actions:
            if isinstance(action, Send):
                self.to_sender.append(action.message)
            elif isinstance(action, PostReceive):
                self.posted.append(action.frame)
            elif isinstance(action, Deliver):
                self.delivered.append((action.frame, self.slab_bytes))
            else:
                self.receiver_events.append(action)

    def offer(self, transfer_id, num_tokens):
        self.to_receiver.append(self.sender.offer(transfer_id, num_tokens))

    def reserve(self, transfer_id, num_tokens, num_cached_tokens=0):
        num_blocks = num_blocks_of(num_tokens, FACTS.block_size)
        self.to_sender.append(self.receiver.reserve(transfer_id, num_blocks, num_cached_tokens))

    def enqueue(self, transfer_id, first_block, num_blocks):
        for group in range(len(FACTS.groups)):
            pieces = rectangles(FACTS, group, first_block, num_blocks, WELCOME.frame_sizes[0])
            self.sender.enqueue(transfer_id, pieces)

    def commit(self, transfer_id, tokens=TOKEN):
        self.sender_does(self.sender.commit(transfer_id, tokens, 0))

    # One step of each machine part; False if there was nothing to do.

    def step_to_receiver(self):
        if not self.to_receiver:
            return False
        self.receiver_does(self.receiver.on_message(self.to_receiver.popleft()))
        return True

    def step_to_sender(self):
        if not self.to_sender:
            return False
        self.sender_does(self.sender.on_message(self.to_sender.popleft()))
        return True

    def step_gather(self):
        frame = self.sender.next_frame()
        if frame is None:
            return False
        self.gathered.append(frame)
        return True

    def step_send(self):
        if not self.gathered:
            return False
        frame = self.gathered.popleft()
        payload = payload_of(frame)
        header = self.sender.frame_gathered(frame, zlib.crc32(payload))
        if header is not None:
            self.to_receiver.append(header)
            self.wire.append(payload.ljust(frame.size_bytes, b"\xff"))
            self.on_wire.append(frame)
        return True

    def step_receive(self):
        """The bytes reach the slab; the sender's wait may return."""
        if not self.posted or not self.wire:
            return False
        frame: IncomingFrame = self.posted.popleft()
        data = self.wire.popleft()
        assert len(data) == frame.size_bytes
        if self.corrupt_next:
            data, self.corrupt_next = bytes([data[0] ^ 1]) + data[1:], False
        self.slab_bytes = data[: frame.payload_bytes]
        self.sender_does(self.sender.frame_sent(self.on_wire.popleft()))
        self.receiver_does(self.receiver.frame_received(frame))
        return True

    def step_scatter(self):
        if not self.delivered:
            return False
        frame, data = self.delivered.popleft()
        checksum = None
        if self.receiver.may_scatter(frame):
            self._write(frame, data)
            checksum = zlib.crc32(data)
        self.receiver_does(self.receiver.frame_scattered(frame, checksum))
        return True

    def _write(self, frame, data):
        cells = self.pool.setdefault(frame.transfer_id, {})
        size = layer_block_bytes(FACTS.groups[frame.rectangle.group], FACTS.block_size)
        for index, cell in enumerate(cells_of(frame.rectangle)):
            assert cell not in cells
            cells[cell] = data[index * size : (index + 1) * size]

    STEPS = ("to_receiver", "to_sender", "gather", "send", "receive", "scatter")

    def step(self, name):
        moved = getattr(self, f"step_{name}")()
        self.check()
        return moved

    def run(self):
        """Step until nothing moves."""
        while sum(self.step(name) for name in self.STEPS):
            pass

    def committed(self, events):
        return [event.transfer_id for event in events if isinstance(event, TransferCommitted)]

    def require_quiet(self):
        """Nothing moves any more, and every slab and credit is home."""
        queues = (self.to_receiver, self.to_sender, self.wire, self.posted, self.delivered)
        assert sum(map(len, queues)) == 0
        assert self.receiver.num_free_slabs == WELCOME.num_slabs
        assert self.sender._credits == WELCOME.num_slabs
        assert self.sender.num_transfers == self.receiver.num_transfers == 0

    def require_arrived(self, transfer_id, num_tokens, num_cached_tokens=0):
        """Exactly the missing blocks were written, with the sender's bytes."""
        first = num_cached_tokens // FACTS.block_size
        end = num_blocks_of(num_tokens, FACTS.block_size)
        expected = {
            (group, block, layer)
            for group, shape in enumerate(FACTS.groups)
            for block in range(first, end)
            for layer in range(shape.num_layers)
        }
        assert self.pool.get(transfer_id, {}) == {cell: cell_bytes(transfer_id, cell) for cell in expected}
