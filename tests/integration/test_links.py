"""Both ends of a KV link over real gRPC and gloo in one process, with fake engines and real tensors."""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from decode_svc.links import DecodeLinks
from decode_svc.receiving import Receiving
from engine.facts import KvGroupSpec
from engine.kv_pool import LocalKvPool
from engine.parallel.ranks import ONE_RANK
from kvtransfer.errors import TransportBroken
from kvtransfer.layout import KvFacts, KvGroup
from kvtransfer.messages import Commit, FirstToken
from kvtransfer.transports.segment import Segment, SegmentRefused
from kvtransfer.transports.shm import HostSharing
from prefill_svc.export import Export
from prefill_svc.links import PrefillLinks
from protos.tandem.v1 import common_pb2, kvlink_pb2_grpc
from runtime import rpc
from runtime.settings import WorkerSettings
from worker.attach import AttemptKey
from worker.metrics import WorkerMetrics

FACTS = KvFacts(
    protocol_major=1,
    model_hash="m",
    tokenizer_hash="t",
    block_size=4,
    max_model_len=64,
    rope="{}",
    groups=(KvGroup(name="target", num_layers=3, num_kv_heads=1, head_dim=2, dtype="float32"),),
)
NUM_BLOCKS = 16


class FakeThread:
    """An engine thread that only runs commands."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._commands: queue.SimpleQueue[Callable[[Any], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def post(self, command: Callable[[Any], None]) -> None:
        self._commands.put(command)

    def stop(self) -> None:
        self._commands.put(None)
        self._thread.join(5)

    def _run(self) -> None:
        while (command := self._commands.get()) is not None:
            command(self._engine)


def own_pool() -> LocalKvPool:
    pool = LocalKvPool(
        [KvGroupSpec(name="target", num_layers=3, num_kv_heads=1, head_dim=2, dtype="float32")],
        num_blocks=NUM_BLOCKS,
        block_size=4,
        num_host_blocks=0,
        device=torch.device("cpu"),
    )
    pool.groups[0].normal_()
    return pool


class FakeEngine:
    """A pool of its own, or the first one of several ranks', and requests that take its first free blocks."""

    def __init__(self, ranks: Any = None) -> None:
        tables = SimpleNamespace(num_blocks=NUM_BLOCKS)
        pool = own_pool() if ranks is None else ranks.pools[0]
        self.kv_cache = SimpleNamespace(pool=pool, groups=pool.groups, tables=tables)
        self.model = SimpleNamespace(ranks=ranks or ONE_RANK)

    def enter(self, request: Any) -> None:
        request.rank = 0

    def reserve(self, request: Any) -> bool:
        request.block_tables = [list(range(request.num_blocks))]
        return True


def parts(name: str, facts: KvFacts = FACTS, transport: str = "auto", ranks: Any = None) -> Any:
    loop = asyncio.get_running_loop()
    engine = FakeEngine(ranks)
    bridge = SimpleNamespace(
        thread=FakeThread(engine), on_loop=loop.call_soon_threadsafe, call_roll=lambda: None
    )
    return SimpleNamespace(
        settings=WorkerSettings(transport=transport),
        identity=common_pb2.WorkerIdentity(worker_id=name, boot_id=f"boot of {name}"),
        facts=facts,
        engine=engine,
        bridge=bridge,
        metrics=WorkerMetrics(name),
    )


class Owner:
    """The prefill role's part: notes how transfers go."""

    def __init__(self) -> None:
        self.events: asyncio.Queue[tuple[str, str]] = asyncio.Queue()

    def granted(self, key: AttemptKey) -> None:
        pass

    def sent(self, key: AttemptKey) -> None:
        self.events.put_nowait(("sent", ""))

    def committed(self, key: AttemptKey) -> None:
        self.events.put_nowait(("committed", ""))

    def failed(self, key: AttemptKey, error: Exception) -> None:
        self.events.put_nowait(("failed", str(error)))


class Intake:
    """The decode role's part: takes every offer of which it knows the request."""

    def __init__(self, made: Any) -> None:
        self._made = made
        self.wanted: dict[bytes, Any] = {}
        self.links: dict[bytes, Any] = {}
        self.commits: asyncio.Queue[Commit] = asyncio.Queue()
        self.failures: list[str] = []
        self.receiving = Receiving(
            lambda *reservation: made.bridge.on_loop(self._reserved, *reservation),
            lambda transfer_id, error: self.failures.append(str(error)),
        )

    def offered(self, link: Any, transfer_id: bytes) -> None:
        if transfer_id in self.wanted:
            self.links[transfer_id] = link
            link.hold(transfer_id)
            self._made.bridge.thread.post(lambda engine: self._take(engine, transfer_id))

    def _take(self, engine: Any, transfer_id: bytes) -> None:
        self.receiving.want(engine, transfer_id, self.wanted[transfer_id])
        self.receiving.reserve_waiting(engine)

    def _reserved(self, transfer_id: bytes, num_blocks: int, num_cached_tokens: int) -> None:
        self.links[transfer_id].reserve(transfer_id, num_blocks, num_cached_tokens)

    def commit(self, transfer_id: bytes, commit: Commit, num_groups: int) -> None:
        self._made.bridge.on_loop(self.commits.put_nowait, commit)

    def committed(self, transfer_id: bytes) -> None:
        """Nothing of the loop's waits for it here."""

    def failed(self, transfer_id: bytes, error: Exception) -> None:
        self.failures.append(str(error))


@asynccontextmanager
async def pair(
    sender_facts: KvFacts = FACTS,
    transports: tuple[str, str] = ("auto", "auto"),
    receiver_facts: KvFacts = FACTS,
    ranks: tuple[Any, Any] = (None, None),
) -> AsyncIterator[Any]:
    """A sender, a receiver, and the receiver's identity as gateways name it."""
    sender = parts("p", sender_facts, transports[0], ranks[0])
    receiver = parts("d", receiver_facts, transports[1], ranks[1])
    owner, intake = Owner(), Intake(receiver)
    receivers = DecodeLinks(receiver, intake)
    server = rpc.server([], max_message_bytes=1 << 20)
    kvlink_pb2_grpc.add_KvLinkServiceServicer_to_server(receivers, server)
    port = rpc.listen(server, "127.0.0.1", 0, "--port")
    peer = common_pb2.WorkerIdentity(worker_id="d", boot_id="boot of d", address=f"127.0.0.1:{port}")
    await server.start()
    senders = PrefillLinks(sender, owner)
    task = asyncio.ensure_future(senders.run())
    await asyncio.sleep(0)
    try:
        yield SimpleNamespace(
            sender=sender, receiver=receiver, owner=owner, intake=intake, senders=senders,
            receivers=receivers, peer=peer,
        )  # fmt: skip
    finally:
        task.cancel()
        await asyncio.wait([task])
        await server.stop(0.2)
        for made in (sender, receiver):
            made.bridge.thread.stop()


def export(number: int, num_tokens: int) -> Export:
    return Export(
        key=AttemptKey(0, number, 1), transfer_id=bytes([number]) * 16, num_tokens=num_tokens, block_size=4
    )


def moved(made: Any) -> float:
    samples = next(iter(made.metrics.transfer_bytes.collect())).samples
    return sum(sample.value for sample in samples)


async def outcome(owner: Owner) -> tuple[str, str]:
    async with asyncio.timeout(10):
        return await owner.events.get()


async def send_three_blocks(both: Any, number: int = 1, layers: tuple[int, ...] = ()) -> Export:
    """Offer a transfer in two chunks, each told of at these numbers of layers."""
    item = export(number, 10)
    both.intake.wanted[item.transfer_id] = SimpleNamespace(
        key="r", num_blocks=3, num_cached_tokens=0, block_tables=[]
    )
    both.senders.add(both.peer, item)
    for computed in (6, 10):
        for num_layers in layers:
            item.advance_layers(((7, 2, 9),), computed, num_layers)
            both.senders.advance(item)
        item.advance(((7, 2, 9),), computed)
        both.senders.advance(item)
    item.first_tokens = (FirstToken(choice=0, token_id=5),)
    both.senders.advance(item)
    return item


async def commit_three_blocks(both: Any, number: int = 1, layers: tuple[int, ...] = ()) -> None:
    """The same, to its end."""
    item = await send_three_blocks(both, number, layers)
    assert await outcome(both.owner) == ("sent", "")
    assert await outcome(both.owner) == ("committed", "")
    async with asyncio.timeout(5):
        commit = await both.intake.commits.get()
    assert commit.first_tokens == item.first_tokens


async def move_three_blocks(both: Any, number: int = 1, layers: tuple[int, ...] = ()) -> None:
    """The same; the blocks are equal at the other end."""
    await commit_three_blocks(both, number, layers)
    source, target = (made.engine.kv_cache.groups[0] for made in (both.sender, both.receiver))
    assert torch.equal(target[:, :, :3], source[:, :, [7, 2, 9]])


@pytest.mark.parametrize(
    ("transports", "chosen"),
    [
        (("auto", "auto"), "shm"),
        (("gloo", "auto"), "gloo"),
        (("auto", "gloo"), "gloo"),
        (("shm", "auto"), "shm"),
    ],
)
async def test_blocks_arrive_chunk_by_chunk_and_commit(transports: tuple[str, str], chosen: str) -> None:
    async with pair(transports=transports) as both:
        await move_three_blocks(both)
        block_bytes = both.sender.engine.kv_cache.groups[0][:, :, 0].nbytes
        assert moved(both.sender) == moved(both.receiver) == 3 * block_bytes
        assert both.senders.open_transports == {"d": chosen}
        assert both.receivers.open_transports == {"p": chosen}


@pytest.mark.parametrize("layers", [(1, 2, 3), (2,), (3,)])
async def test_layers_of_a_step_that_runs_arrive_and_commit(layers: tuple[int, ...]) -> None:
    async with pair() as both:
        await move_three_blocks(both, layers=layers)
        block_bytes = both.sender.engine.kv_cache.groups[0][:, :, 0].nbytes
        assert moved(both.sender) == moved(both.receiver) == 3 * block_bytes


async def test_the_threads_of_a_link_turn_to_the_pools_device_first(monkeypatch: pytest.MonkeyPatch) -> None:
    turned = []

    def turn(device: torch.device) -> None:
        turned.append((threading.current_thread().name, str(device)))

    monkeypatch.setattr("prefill_svc.links.use_apart", turn)
    monkeypatch.setattr("decode_svc.links.use_device", turn)
    async with pair() as both:
        await move_three_blocks(both)
    assert sorted(turned) == [("kv-receive-1", "cpu"), ("kv-send-1", "cpu")]


async def test_an_abort_in_the_midst_of_a_step_commits_nothing() -> None:
    """Some layers of some blocks have left; nothing may come of them, and the link goes on."""
    async with pair() as both:
        item = export(1, 10)
        both.intake.wanted[item.transfer_id] = SimpleNamespace(
            key="r", num_blocks=3, num_cached_tokens=0, block_tables=[]
        )
        both.senders.add(both.peer, item)
        item.advance_layers(((7, 2, 9),), 10, 2)
        both.senders.advance(item)
        async with asyncio.timeout(5):
            while not moved(both.receiver):
                await asyncio.sleep(0.01)
        both.senders.cancel(item, "given up")
        item.advance(((7, 2, 9),), 10)
        item.first_tokens = (FirstToken(choice=0, token_id=5),)
        both.senders.advance(item)
        await move_three_blocks(both, 2)
        assert both.intake.commits.empty()


async def test_memory_that_does_not_open_here_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As between two hosts, or two containers: the address leads nowhere."""

    def refuse(address: bytes, num_bytes: int) -> None:
        raise SegmentRefused("out of reach")

    monkeypatch.setattr(Segment, "open", refuse)
    async with pair() as both:
        await move_three_blocks(both)
        assert both.senders.open_transports == {"d": "gloo"}
    async with pair(transports=("shm", "auto")) as both:
        both.senders.add(both.peer, export(1, 10))
        kind, message = await outcome(both.owner)
        assert (kind, "no transport for this link: shm: out of reach" in message) == ("failed", True)


@pytest.mark.parametrize(
    "error", [TransportBroken("no memory"), OSError("no memory"), RuntimeError("no memory")]
)
async def test_a_transport_that_was_accepted_and_fails_is_not_tried_again(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(HostSharing, "export", fail)
    async with pair() as both:
        both.senders.add(both.peer, export(2, 10))
        kind, message = await outcome(both.owner)
        assert (kind, message.endswith("no memory")) == ("failed", True)
        await move_three_blocks(both)
        assert both.senders.open_transports == {"d": "gloo"}


async def test_ends_that_want_different_transports_say_so() -> None:
    async with pair(transports=("shm", "gloo")) as both:
        both.senders.add(both.peer, export(1, 10))
        kind, message = await outcome(both.owner)
        assert (kind, "shm: this worker uses gloo" in message) == ("failed", True)


async def test_workers_that_do_not_fit_refuse_each_other_by_field_and_move_nothing() -> None:
    async with pair(replace(FACTS, block_size=8, model_hash="other")) as both:
        both.senders.add(both.peer, export(1, 10))
        kind, message = await outcome(both.owner)
        assert kind == "failed"
        assert "block_size: 4 != 8" in message
        assert "model_hash: m != other" in message
        assert moved(both.sender) == moved(both.receiver) == 0
        assert both.receivers.open_transports == {}


async def test_another_boot_of_the_receiver_is_refused() -> None:
    async with pair() as both:
        stale = common_pb2.WorkerIdentity(worker_id="d", boot_id="an older one", address=both.peer.address)
        both.senders.add(stale, export(1, 10))
        kind, message = await outcome(both.owner)
        assert (kind, "boot" in message) == ("failed", True)


async def test_a_receiver_that_is_not_there_fails_at_once() -> None:
    async with pair() as both:
        nobody = common_pb2.WorkerIdentity(worker_id="x", boot_id="x", address="127.0.0.1:1")
        both.senders.add(nobody, export(1, 10))
        kind, message = await outcome(both.owner)
        assert (kind, "KV link" in message) == ("failed", True)
        both.senders.cancel(export(2, 3), "unknown to every link")


@pytest.mark.parametrize("known", [True, False])
async def test_cancel_before_the_commit_frees_the_link_for_others(known: bool) -> None:
    async with pair() as both:
        item, other = export(1, 10), export(2, 4)
        for wanted in (item, other) if known else (other,):
            both.intake.wanted[wanted.transfer_id] = SimpleNamespace(
                key=wanted.key, num_blocks=3, num_cached_tokens=0, block_tables=[]
            )
        both.senders.add(both.peer, item)
        both.senders.cancel(item, "given up")
        both.senders.add(both.peer, other)
        other.advance(((3,),), 4)
        other.first_tokens = (FirstToken(choice=0, token_id=5),)
        both.senders.advance(other)
        assert [await outcome(both.owner) for _ in range(2)] == [("sent", ""), ("committed", "")]
