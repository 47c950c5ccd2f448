"""Both ends of a link's lanes in one process: ranks are objects, channels are real, transports local."""

import queue
import socket
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from engine.facts import KvGroupSpec
from engine.kv_pool import LocalKvPool
from engine.parallel.shard import Shard
from engine.parallel.wire import Channel, encode
from kvtransfer.lanes import RECEIVER, SENDER
from kvtransfer.layout import KvFacts, KvGroup
from kvtransfer.messages import Welcome
from kvtransfer.plan import frame_sizes
from kvtransfer.transport import make_slabs
from kvtransfer.transports.local import local_pair
from runtime.settings import WorkerSettings
from worker.lanes import open as lane_open
from worker.lanes.follower import FollowerLinks

NUM_LAYERS, BLOCK_SIZE, HEAD_DIM, NUM_BLOCKS = 3, 4, 2, 16
NUM_SLABS = 4
DRAFT = KvGroupSpec(name="draft", num_layers=2, num_kv_heads=3, head_dim=4, dtype="float32")


def spec_of(num_kv_heads):
    return KvGroupSpec(
        name="target", num_layers=NUM_LAYERS, num_kv_heads=num_kv_heads, head_dim=HEAD_DIM, dtype="float32"
    )


def facts_of(num_kv_heads):
    groups = tuple(
        KvGroup(
            name=spec.name,
            num_layers=spec.num_layers,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            dtype=spec.dtype,
        )
        for spec in (spec_of(num_kv_heads), DRAFT)
    )
    return KvFacts(
        protocol_major=1,
        model_hash="m",
        tokenizer_hash="t",
        block_size=BLOCK_SIZE,
        max_model_len=64,
        rope="",
        groups=groups,
    )


class Ranks:
    """All ranks of one worker, as rank 0 sees them; `pools` by rank."""

    def __init__(self, num_kv_heads, size):
        self.shard = Shard(0, size)
        self.heads = [Shard(rank, size).kv_heads(num_kv_heads) for rank in range(size)]
        self.pools = [
            LocalKvPool(
                [Shard(rank, size).kv_spec(spec_of(num_kv_heads)), *([] if rank else [DRAFT])],
                num_blocks=NUM_BLOCKS,
                block_size=BLOCK_SIZE,
                num_host_blocks=0,
                device=torch.device("cpu"),
            )
            for rank in range(size)
        ]
        device = torch.device("cpu")
        self.services = [FollowerLinks(SimpleNamespace(pool=pool, device=device)) for pool in self.pools[1:]]
        self.channels = []
        self._told = b""
        self._told_to, self._taken_from = (Channel(end, "rank", 5.0) for end in socket.socketpair())

    def fill(self, whole):
        """Each rank's heads of [layers, 2, blocks, block size, all heads, head dim]."""
        for pool, heads in zip(self.pools, self.heads, strict=True):
            pool.groups[0].copy_(whole[..., heads, :])

    def whole(self, num_kv_heads):
        """The same put together; where several ranks store a head, they must agree."""
        found = torch.full((*self.pools[0].groups[0].shape[:4], num_kv_heads, HEAD_DIM), torch.nan)
        for pool, heads in zip(self.pools, self.heads, strict=True):
            before = found[..., heads, :]
            agrees = before.isnan() | (before == pool.groups[0])
            if not agrees.all():
                pytest.fail("two ranks hold different bytes of one head")
            found[..., heads, :] = pool.groups[0]
        return found

    def connect(self, rank, link):
        ours, theirs = socket.socketpair()
        channel = Channel(ours, f"rank {rank}", None)
        self.channels.append(channel)
        self.services[rank - 1].begin(link, Channel(theirs, "rank 0", None))
        return channel

    def tell(self, op, *arrays):
        self._told = encode(op, *arrays)

    def answers(self, op):
        return [self._exchange(service.scatter(self._exchange(self._told))) for service in self.services]

    def _exchange(self, message):
        self._told_to.send(message)
        return self._taken_from.receive()

    def close(self):
        self._told_to.close()
        self._taken_from.close()


class LocalWires:
    """An opener of transports: both ends of a lane get those of one pair."""

    def __init__(self):
        self.pairs = {}
        self.opened = []

    def __call__(self, opening, exchange, device):
        number = opening.lane.number
        theirs = int(exchange(str(number).encode()))
        assert theirs == number, "both ends open the same lane"
        self.opened.append((number, opening.end))
        slabs = [make_slabs(NUM_SLABS, opening.lane.slab_bytes) for _ in range(2)]
        return self.pairs.setdefault(number, local_pair((slabs[0], slabs[1])))[opening.end]


def parts_of(ranks, num_kv_heads):
    pool = SimpleNamespace(local=ranks.pools[0])
    cache = SimpleNamespace(pool=pool, groups=ranks.pools[0].groups)
    return SimpleNamespace(
        engine=SimpleNamespace(kv_cache=cache, model=SimpleNamespace(ranks=ranks)),
        facts=facts_of(num_kv_heads),
        settings=WorkerSettings(),
    )


def open_both(senders, receivers, num_kv_heads, slab_bytes=8192):
    """The lanes of both ends, over a transport named "local"."""
    welcome = Welcome(
        epoch=1, transport="local", frame_sizes=frame_sizes(slab_bytes), num_slabs=NUM_SLABS, num_groups=2
    )
    mail = [queue.SimpleQueue(), queue.SimpleQueue()]

    def exchange(end, blob):
        mail[1 - end].put(blob)
        return mail[end].get(timeout=5)

    def open_end(end):
        ours, theirs = (senders, receivers) if end == SENDER else (receivers, senders)
        parts = parts_of(ours, num_kv_heads)
        return lane_open._open(parts, welcome, partial(exchange, end), end, theirs.shard.size)

    with ThreadPoolExecutor(2) as executor:
        ends = [executor.submit(open_end, end) for end in (SENDER, RECEIVER)]
    for end, other in zip(ends, reversed(ends), strict=True):
        if end.exception() and not other.exception():
            other.result().close()  # as its control stream's end would
    return tuple(end.result() for end in ends)
