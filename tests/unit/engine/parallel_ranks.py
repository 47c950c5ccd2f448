"""Tensor-parallel ranks whose followers are threads of the test: all of the real code but the processes."""

import socket
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import torch

from engine.loader import load_model
from engine.parallel.errors import RankLost
from engine.parallel.follower import Follower, Start
from engine.parallel.groups import GlooGroup
from engine.parallel.leader import Leader
from engine.parallel.member import Member
from engine.parallel.shard import Shard
from engine.parallel.wire import Channel, Op, encode

TIMEOUT_S = 5.0


def _follow(follower, ends):
    try:
        follower.load()
        follower.run()
    except RankLost:
        pass
    for end in ends:
        end.close()


def follower_thread(rank, size, path, config, store, make_service):
    """A follower on a thread of its own: as its leader knows it, itself, and what to join."""
    pairs = [socket.socketpair() for _ in range(2)]
    (commands, links), ends = zip(*pairs, strict=True)
    follower = Follower(*(Channel(end, "rank 0", None) for end in ends))
    follower.service = make_service(follower)
    threads = [
        threading.Thread(target=_follow, args=(follower, ends)),
        threading.Thread(target=follower.take_links),
    ]
    for thread in threads:
        thread.start()
    start = Start(
        rank=rank,
        size=size,
        path=str(path),
        store=str(store),
        dtype=config.dtype,
        device="cpu",
        block_size=config.block_size,
        max_model_len=config.max_model_len,
    ).to_json()
    member = Member(rank, *(Channel(end, f"rank {rank}", TIMEOUT_S) for end in (commands, links)))
    member.commands.send(encode(Op.START, num_payload_bytes=len(start)), start)
    return member, follower, threads


@contextmanager
def ranks_in_threads(path: Path, config, size: int, folder: Path, make_service):
    """A Leader of `size` ranks, with its `followers`."""
    folder.mkdir()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)  # ranks wait for each other all the time
    made = [
        follower_thread(rank, size, path, config, folder / "store", make_service) for rank in range(1, size)
    ]
    leader = Leader([member for member, _, _ in made], folder / "store", torch.device("cpu"))
    leader.followers = [follower for _, follower, _ in made]
    try:
        yield leader
    finally:
        leader.close()
        sys.setswitchinterval(interval)
        for _, _, threads in made:
            for thread in threads:
                thread.join(TIMEOUT_S)
                assert not thread.is_alive()


def on_ranks(size: int, store: Path, run):
    """What `run(group, shard)` returns on each rank of a group of threads."""
    found = [None] * size

    def enter(rank):
        shard = Shard(rank, size)
        found[rank] = run(GlooGroup.open(store, shard), shard)

    threads = [threading.Thread(target=enter, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@contextmanager
def parallel_model(path: Path, config, size: int, folder: Path, make_service=lambda follower: None):
    """A checkpoint, loaded by so many ranks."""
    with ranks_in_threads(path, config, size, folder, make_service) as ranks:
        yield load_model(path, config, ranks=ranks)


def run(engine, requests):
    """The tokens of all requests, with every invariant checked after every step."""
    for request in requests:
        engine.submit(request)
    while engine.has_work():
        engine.step()
        engine.check()
    return [request.output_token_ids for request in requests]
