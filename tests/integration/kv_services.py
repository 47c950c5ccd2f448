"""Small services around the pumps: real pools, real gather and scatter, threads as in the workers."""

import queue
import threading
import time

import pytest
import torch

from kernels.ops import gather_blocks_summed, scatter_blocks_summed
from kernels.summed_copies import unsigned
from kvtransfer.actions import Granted, TransferCommitted, TransferFailed
from kvtransfer.layout import KvFacts, KvGroup, block_bytes, num_blocks_of
from kvtransfer.messages import FirstToken, Welcome
from kvtransfer.plan import frame_sizes, rectangles
from kvtransfer.receiver import ReceiverLink
from kvtransfer.receiver_pump import ReceiverPump
from kvtransfer.sender import SenderLink
from kvtransfer.sender_pump import SenderPump
from kvtransfer.transport import NUM_SENDER_SLABS, make_slabs
from runtime.clock import SystemClock

FACTS = KvFacts(
    protocol_major=1,
    model_hash="m",
    tokenizer_hash="t",
    block_size=4,
    max_model_len=4096,
    rope="",
    groups=(KvGroup(name="target", num_layers=4, num_kv_heads=2, head_dim=8, dtype="float32"),),
)
GROUP = FACTS.groups[0]
SLAB_BYTES = 4 * 4096
assert block_bytes(GROUP, FACTS.block_size) == 2048
WELCOME = Welcome(epoch=1, transport="gloo", frame_sizes=frame_sizes(SLAB_BYTES), num_slabs=4)
TOKEN = (FirstToken(choice=0, token_id=7),)


def make_pool(num_blocks, fill=None):
    """[num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim], random unless `fill` is given."""
    shape = (GROUP.num_layers, 2, num_blocks, FACTS.block_size, GROUP.num_kv_heads, GROUP.head_dim)
    return torch.rand(shape) if fill is None else torch.full(shape, fill)


def slabs_of(rank):
    """Those of one end; rank 0 sends."""
    return make_slabs(WELCOME.num_slabs if rank else NUM_SENDER_SLABS, SLAB_BYTES)


class Events:
    """What a pump told its service; `wait` blocks until a condition on it holds."""

    def __init__(self):
        self.changed = threading.Condition()
        self.all = []
        self.failures = []
        self.failed_at = None
        self.on_failed = lambda reason: None

    def add(self, event):
        with self.changed:
            self.all.append(event)
            self.changed.notify_all()

    def failed(self, reason):
        with self.changed:
            self.failures.append(reason)
            self.failed_at = time.monotonic()
            self.changed.notify_all()
        self.on_failed(reason)

    def wait(self, done, timeout_s=5.0):
        with self.changed:
            if not self.changed.wait_for(lambda: done(self), timeout_s):
                pytest.fail(f"{self.all} {self.failures}")

    def ids(self, kind):
        return [event.transfer_id for event in self.all if isinstance(event, kind)]

    def wait_ended(self, count):
        self.wait(lambda e: len(e.ids(TransferCommitted) + e.ids(TransferFailed)) >= count)


class Whole:
    """A carrier over one transport, with frames that are not cut."""

    def __init__(self, transport):
        self.transport = transport
        self.num_slabs = len(transport.slabs)
        self.watch = transport.watch
        self.close = transport.close

    def start_send(self, group, size_index, slab):
        return self.transport.start_send(self._view(size_index, slab))

    def recv(self, group, size_index, slab):
        self.transport.recv(self._view(size_index, slab))

    def _view(self, size_index, slab):
        return self.transport.slabs[slab][: WELCOME.frame_sizes[size_index]]


class SenderService:
    """A prefill worker's part; `post` puts messages on the way to the receiver."""

    def __init__(self, transport, post, num_blocks=64):
        self.pool = make_pool(num_blocks).to(transport.slabs[0].device)
        self.slabs = transport.slabs
        self.tables = {}
        self.events = Events()
        self.pump = SenderPump(
            SenderLink(facts=FACTS, welcome=WELCOME, clock=SystemClock()),
            Whole(transport),
            gather=self.gather,
            post=post,
            on_event=self.events.add,
            on_failed=self.events.failed,
        )

    def gather(self, frame, slab):
        table = self.tables.get(frame.transfer_id)
        if table is None:
            return None
        r = frame.rectangle
        blocks = table[r.first_block : r.first_block + r.num_blocks]
        slab = self.slabs[slab]
        return unsigned(gather_blocks_summed(self.pool, blocks, r.first_layer, r.num_layers, slab)[1])

    def transfer(self, transfer_id, blocks):
        """Offer, hand everything in block by block, commit."""
        self.tables[transfer_id] = blocks
        self.pump.offer(transfer_id, len(blocks) * FACTS.block_size)
        for position in range(len(blocks)):
            self.pump.enqueue(transfer_id, rectangles(FACTS, 0, position, 1, SLAB_BYTES))
        self.pump.commit(transfer_id, TOKEN, 0)

    def wait_granted(self, transfer_id):
        self.events.wait(lambda e: transfer_id in e.ids(Granted))


class ReceiverService:
    """A decode worker's part, with its engine thread."""

    def __init__(self, transport, post, num_blocks=64, slow_s=0.0):
        self.pool = make_pool(num_blocks, fill=-1.0).to(transport.slabs[0].device)
        self.slabs = transport.slabs
        self.tables = {}
        self.events = Events()
        self.slow_s = slow_s
        self.inbox = queue.SimpleQueue()
        self.pump = ReceiverPump(
            ReceiverLink(facts=FACTS, welcome=WELCOME, clock=SystemClock()),
            Whole(transport),
            deliver=self.inbox.put,
            post=post,
            on_event=self.events.add,
            on_failed=self.events.failed,
        )
        self.engine = threading.Thread(target=self.run_engine, daemon=True)
        self.engine.start()

    def run_engine(self):
        while (frame := self.inbox.get()) is not None:
            time.sleep(self.slow_s)
            checksum = None
            if self.pump.may_scatter(frame):
                r = frame.rectangle
                blocks = self.tables[frame.transfer_id][r.first_block : r.first_block + r.num_blocks]
                slab = self.slabs[frame.slab]
                _, total = scatter_blocks_summed(self.pool, blocks, r.first_layer, r.num_layers, slab)
                checksum = unsigned(total)
            self.pump.frame_scattered(frame, checksum)

    def reserve(self, transfer_id, blocks, num_cached_tokens=0):
        self.tables[transfer_id] = blocks
        assert num_blocks_of(num_cached_tokens, FACTS.block_size) <= len(blocks)
        self.pump.reserve(transfer_id, len(blocks), num_cached_tokens)

    def stop(self):
        self.pump.stop()
        self.inbox.put(None)
        self.engine.join(5)


class Control:
    """An ordered, lossless message queue with its own thread, like one direction of a gRPC stream."""

    def __init__(self):
        self.queue = queue.SimpleQueue()
        self.thread = threading.Thread(target=self.run, daemon=True)

    def start(self, on_message):
        self.on_message = on_message
        self.thread.start()

    def run(self):
        while (message := self.queue.get()) is not None:
            self.on_message(message)

    def stop(self):
        self.queue.put(None)
        self.thread.join(5)
