"""Lanes between workers whose other ranks are real processes, over real transports, without services."""

import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

import tandem
from engine.config import EngineConfig
from engine.engine import Engine
from engine.loader import load_model
from engine.parallel.errors import RankLost
from engine.parallel.start import start_ranks
from engine.parallel.wire import Channel
from engine.request import Request, SamplingParams
from kvtransfer.errors import TransportBroken
from kvtransfer.lanes import RECEIVER, SENDER
from kvtransfer.messages import Welcome
from kvtransfer.plan import frame_sizes, rectangle_bytes, rectangles, size_index
from runtime.settings import WorkerSettings
from worker.lanes import open as lane_open
from worker.lanes.link_lanes import LinkLanes
from worker.lanes.stripes import Piece
from worker.main import kv_facts

MODEL = Path(tandem.__file__).parent / "demo_model"
CONFIG = EngineConfig(dtype="float32", num_blocks=256, max_model_len=512, prefix_cache=False)
NUM_SLABS = 4
SLAB_BYTES = 1 << 18
SIZES = frame_sizes(SLAB_BYTES)


class Worker:
    """An engine of so many ranks."""

    def __init__(self, size: int, devices: Sequence[str] = ()) -> None:
        devices = devices or ["cpu"] * size
        config = replace(CONFIG, device=devices[0])
        self.ranks = start_ranks(MODEL, config, devices, "worker.lanes.follower")
        try:
            self.engine = Engine(config, load_model(MODEL, config, ranks=self.ranks))
        except BaseException:
            self.ranks.close()
            raise
        self.parts: Any = SimpleNamespace(
            engine=self.engine, facts=kv_facts(self.engine, "tokenizer"), settings=WorkerSettings()
        )
        self.size = size

    @property
    def followers(self) -> list[psutil.Process]:
        return [psutil.Process(member.process.pid) for member in getattr(self.ranks, "members", [])]


@pytest.fixture(scope="module")
def workers() -> Iterator[dict[str, Worker]]:
    """Two of two ranks, two of one."""
    made = {}
    try:
        with ThreadPoolExecutor(2) as executor:
            pairs = zip(("P2", "D2"), executor.map(Worker, (2, 2)), strict=True)
            made |= dict(pairs)
        made |= {name: Worker(1) for name in ("P1", "D1")}
        yield made
    finally:
        for worker in made.values():
            worker.ranks.close()


def open_both(sender: Worker, receiver: Worker, transport: str) -> tuple[LinkLanes, LinkLanes]:
    welcome = Welcome(epoch=1, transport=transport, frame_sizes=SIZES, num_slabs=NUM_SLABS)
    mail = [queue.SimpleQueue(), queue.SimpleQueue()]  # type: ignore[var-annotated]

    def exchange(end: int, blob: bytes) -> bytes:
        mail[1 - end].put(blob)
        return mail[end].get(timeout=5)

    with ThreadPoolExecutor(2) as executor:
        ends = [
            executor.submit(lane_open._open, ours.parts, welcome, partial(exchange, end), end, theirs.size)
            for end, ours, theirs in ((SENDER, sender, receiver), (RECEIVER, receiver, sender))
        ]
    outgoing, incoming = (end.result() for end in ends)
    return outgoing, incoming


@contextmanager
def linked(sender: Worker, receiver: Worker, transport: str) -> Iterator[tuple[LinkLanes, LinkLanes]]:
    lanes = open_both(sender, receiver, transport)
    try:
        yield lanes
    finally:
        for end in lanes:
            end.close()


def request(**options: Any) -> Request:
    return Request(
        key=0,
        prompt_token_ids=list(range(3, 203)),
        sampling=SamplingParams(max_tokens=16, temperature=0.8, seed=5, ignore_eos=True),
        **options,
    )


def frames_of(worker: Worker, num_blocks: int) -> list[Any]:
    return rectangles(worker.parts.facts, 0, 0, num_blocks, SLAB_BYTES)


def piece(block_ids: list[int], rectangle: Any) -> Piece:
    return Piece(
        group=0,
        block_ids=block_ids[rectangle.first_block : rectangle.first_block + rectangle.num_blocks],
        first_layer=rectangle.first_layer,
        num_layers=rectangle.num_layers,
    )


def move(worker: Worker, lanes: tuple[LinkLanes, LinkLanes], source: list[int], target: list[int]) -> int:
    """All blocks of a table, frame by frame; the number of frames."""
    outgoing, incoming = lanes
    frames = frames_of(worker, len(source))
    for number, rectangle in enumerate(frames):
        size = size_index(SIZES, rectangle_bytes(worker.parts.facts, rectangle))
        own, others = number % outgoing.num_slabs, number % incoming.num_slabs
        checksum = outgoing.gather(piece(source, rectangle), own)
        pending = outgoing.start_send(0, size, own)
        incoming.recv(0, size, others)
        pending.wait()
        assert incoming.scatter(piece(target, rectangle), others) == checksum
    return len(frames)


def tokens_over(sender: Worker, receiver: Worker, lanes: tuple[LinkLanes, LinkLanes]) -> list[int]:
    """Of a request that is prefilled here and decoded there."""
    source, target = request(prefill_only=True), request()
    sender.engine.submit(source)
    outputs: list[Any] = []
    while not outputs:
        outputs += sender.engine.step().outputs
    reserved = receiver.engine.reserve(target)
    assert reserved
    num_frames = move(sender, lanes, source.block_tables[0], target.block_tables[0])
    assert num_frames > NUM_SLABS
    sender.engine.abort(source.key)
    receiver.engine.commit(target, outputs[0].token_ids[0], None)
    while receiver.engine.has_work():
        receiver.engine.step()
    for worker in (sender, receiver):
        worker.engine.check()
        assert worker.engine.load().blocks_used == 0
    return target.output_token_ids


@pytest.fixture(scope="module")
def alone() -> list[int]:
    """The request's tokens in one process."""
    made, engine = request(), Engine(CONFIG, load_model(MODEL, CONFIG))
    engine.submit(made)
    while engine.has_work():
        engine.step()
    return made.output_token_ids


@pytest.mark.parametrize("transport", ["gloo", "shm"])
@pytest.mark.parametrize("pair", ["P2 D2", "P1 D2", "P2 D1"])
def test_tokens_are_those_of_one_process(
    workers: dict[str, Worker], alone: list[int], pair: str, transport: str
) -> None:
    sender, receiver = (workers[name] for name in pair.split())
    with linked(sender, receiver, transport) as lanes:
        assert tokens_over(sender, receiver, lanes) == alone


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four GPUs")
@pytest.mark.parametrize("transport", ["nccl", "shm"])
def test_tokens_over_gpus_are_those_of_one_process(alone: list[int], transport: str) -> None:
    sender, receiver = (Worker(2, [f"cuda:{first}", f"cuda:{first + 1}"]) for first in (0, 2))
    try:
        with linked(sender, receiver, transport) as lanes:
            assert tokens_over(sender, receiver, lanes) == alone
    finally:
        for worker in (sender, receiver):
            worker.ranks.close()


def held(worker: Worker) -> list[tuple[int, int]]:
    """Descriptors and threads of a worker's other ranks, and of this process."""
    return [(process.num_fds(), process.num_threads()) for process in (*worker.followers, psutil.Process())]


def wait_for(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.01)


@pytest.mark.parametrize("transport", ["gloo", "shm"])
def test_links_that_come_and_go_leave_nothing_on_any_rank(workers: dict[str, Worker], transport: str) -> None:
    sender, receiver = workers["P2"], workers["D2"]

    def cycle() -> None:
        with linked(sender, receiver, transport) as lanes:
            lanes[0].watch(lambda reason: None)
            lanes[1].watch(lambda reason: None)
            move(sender, lanes, [5, 3, 60], [1, 2, 63])

    cycle()
    time.sleep(0.1)
    before = held(sender) + held(receiver)
    for _ in range(5):
        cycle()

    def is_as_before() -> bool:
        now = held(sender) + held(receiver)
        pairs = zip(now, before, strict=True)
        return all(fds <= old_fds and threads <= old for (fds, threads), (old_fds, old) in pairs)

    wait_for(is_as_before)


def test_a_frozen_rank_costs_the_epoch_and_the_next_one_works(
    workers: dict[str, Worker], alone: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    sender, receiver = workers["P2"], workers["D2"]
    [frozen] = sender.followers
    rectangle = frames_of(sender, 2)[0]
    with linked(sender, receiver, "gloo") as (outgoing, incoming):
        ended = threading.Event()
        for end in (outgoing, incoming):
            end.watch(lambda reason: ended.set())
        frozen.suspend()
        try:
            wait_for(lambda: frozen.status() == "stopped")
            with monkeypatch.context() as patched:
                patched.setattr("worker.lanes.link_lanes.ANSWER_TIMEOUT_S", 0.3)
                with pytest.raises(TransportBroken, match="rank 1 has not answered"):
                    outgoing.gather(piece([5, 3], rectangle), 0)
            outgoing.close()
        finally:
            frozen.resume()
        assert ended.wait(10)
    with linked(sender, receiver, "gloo") as lanes:
        assert tokens_over(sender, receiver, lanes) == alone


@pytest.mark.parametrize("end", ["P2", "D2"])
def test_a_killed_rank_breaks_every_lane_in_the_midst_of_a_frame(end: str) -> None:
    """Who waits on the whole lanes hears of it at once; the worker of the dead rank ends."""
    other = Worker(1)
    killed = Worker(2)
    lost: queue.SimpleQueue[str] = queue.SimpleQueue()
    killed.ranks.watch(lost.put)
    sender, receiver = (killed, other) if end == "P2" else (other, killed)
    try:
        with linked(sender, receiver, "gloo") as (outgoing, incoming):
            told: list[queue.SimpleQueue[str]] = [queue.SimpleQueue(), queue.SimpleQueue()]
            for lanes, reasons in zip((outgoing, incoming), told, strict=True):
                lanes.watch(reasons.put)
            [follower] = killed.followers
            rectangle = frames_of(sender, 2)[0]
            outgoing.gather(piece([5, 3], rectangle), 0)
            with ThreadPoolExecutor(1) as executor:
                receiving = executor.submit(incoming.recv, 0, 0, 0)  # nobody sends
                os.kill(follower.pid, signal.SIGKILL)
                reasons = [each.get(timeout=10) for each in told]
                outgoing.close()
                incoming.close()
                with pytest.raises(TransportBroken):
                    receiving.result(10)
            assert any("rank 1 has ended" in reason for reason in reasons)
            assert f"(pid {follower.pid}) was killed by signal 9" in lost.get(timeout=10)
            with pytest.raises(TransportBroken):
                outgoing.start_send(0, 0, 0)
            if end == "D2":
                with pytest.raises(RankLost):
                    incoming.scatter(piece([5, 3], rectangle), 0)
        killed.engine.check()
    finally:
        killed.ranks.close()


def test_rank_0_passes_no_payload_on(workers: dict[str, Worker], monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes over its socket pairs is a few hundred bytes a frame, however large the frames are."""
    sender, receiver = workers["P2"], workers["D2"]
    passed = [0]
    count_bytes(monkeypatch, passed)
    with linked(sender, receiver, "shm") as lanes:
        passed[0] = 0
        num_blocks = 40
        num_frames = move(sender, lanes, list(range(num_blocks)), list(range(num_blocks)))
        facts = sender.parts.facts
        payload_bytes = sum(rectangle_bytes(facts, each) for each in frames_of(sender, num_blocks))
    assert 0 < passed[0] < num_frames * 2000
    assert payload_bytes > 50 * passed[0]


def count_bytes(monkeypatch: pytest.MonkeyPatch, passed: list[int]) -> None:
    """Adds up what this process sends to other ranks and receives from them."""
    send, read = Channel.send, Channel._read

    def counted_send(self: Channel, *pieces: bytes) -> None:
        passed[0] += sum(map(len, pieces))
        send(self, *pieces)

    def counted_read(self: Channel, num_bytes: int) -> bytearray:
        passed[0] += num_bytes
        return read(self, num_bytes)

    monkeypatch.setattr(Channel, "send", counted_send)
    monkeypatch.setattr(Channel, "_read", counted_read)
