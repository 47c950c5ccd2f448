"""The collectives of one tensor-parallel group, on gloo for CPUs and NCCL for GPUs.

Groups are built directly, without a default group. Ranks find each other through a FileStore in a directory
that only this user can read: no rendezvous port is opened, and gloo listens on loopback alone.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch._C._distributed_c10d import (
    AllgatherOptions,
    BroadcastOptions,
    FileStore,
    GatherOptions,
    ProcessGroupGloo,
    Work,
)

from engine.parallel.errors import RankLost
from engine.parallel.shard import Shard

CLOSE_TAG = 1

START_TIMEOUT_S = 120.0
"""For making the group, and for operations before rank 0 serves."""


class Group(Protocol):
    """All ranks call the same operations in the same order, each from one thread.

    Raises RankLost if another rank does not come in time. `close` is for any thread.
    """

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over all ranks, the same bits on each."""
        ...

    def gather(self, x: Tensor) -> Tensor | None:
        """[size, *x.shape] on rank 0, None elsewhere."""
        ...

    def broadcast(self, x: Tensor) -> None:
        """Rank 0's contiguous tensor into everybody's."""
        ...

    def replaying(self) -> AbstractContextManager[None]:
        """Around the start of recorded operations: they have their deadline, too."""
        ...

    def check(self) -> None:
        """RankLost if what operations have left may be anything, because the group was closed."""
        ...

    def set_timeout(self, timeout_s: float) -> None:
        """Change how late another rank may come."""
        ...

    def close(self) -> None:
        """Make blocked calls raise soon, here and on other ranks. Idempotent."""
        ...


def open_group(store: Path, shard: Shard, device: torch.device) -> Group:
    """Join the group whose store is this file; returns when all ranks have come.

    An operation may take START_TIMEOUT_S, because ranks compile, capture and warm up when they start; rank 0
    asks for more haste when it begins to serve. Others need not: they end with rank 0.
    """
    if device.type == "cuda":
        from engine.parallel.nccl import NcclGroup

        group: Group = NcclGroup.open(store, shard, device)
    else:
        group = GlooGroup.open(store, shard)
    group.all_reduce(torch.zeros(1, device=device))
    return group


class GlooGroup:
    """On CPUs. Sums are taken in the order of the ranks, so that a row's bits do not depend on its batch:
    gloo's own all-reduce cuts the tensor into pieces and begins each at another rank (and is slower)."""

    def __init__(self, group: Any, shard: Shard, timeout_s: float) -> None:
        self._group = group
        self._shard = shard
        self._timeout = timedelta(seconds=timeout_s)

    @classmethod
    def open(cls, store: Path, shard: Shard, timeout_s: float = START_TIMEOUT_S) -> "GlooGroup":
        """See `open_group`."""
        # torch's stubs know neither the options nor the constructor that takes them.
        gloo = cast("Any", ProcessGroupGloo)
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname="127.0.0.1", lazy_init=False)]
        options._timeout = timedelta(seconds=timeout_s)
        options._threads = 1
        try:
            group = gloo(file_store(store, shard.size, timeout_s), shard.rank, shard.size, options)
        except RuntimeError as error:
            raise RankLost(f"rendezvous: {first_line(error)}") from error
        return cls(group, shard, timeout_s)

    def all_reduce(self, x: Tensor) -> Tensor:
        """See Group."""
        parts: list[Tensor] = list(x.new_empty(self._shard.size, *x.shape))
        self._run(lambda: self._group.allgather([parts], [x.contiguous()], AllgatherOptions()))
        total = parts[0]
        for part in parts[1:]:
            total += part
        return total

    def gather(self, x: Tensor) -> Tensor | None:
        """See Group."""
        options = GatherOptions()
        options.rootRank = 0
        if self._shard.rank != 0:
            self._run(lambda: self._group.gather([], [x], options))
            return None
        parts = x.new_empty(self._shard.size, *x.shape)
        self._run(lambda: self._group.gather([list(parts)], [x], options))
        return parts

    def broadcast(self, x: Tensor) -> None:
        """See Group."""
        options = BroadcastOptions()
        options.rootRank = 0
        self._run(lambda: self._group.broadcast([x], options))

    def replaying(self) -> AbstractContextManager[None]:
        """See Group; an operation that is run again is one like any other."""
        return nullcontext()

    def check(self) -> None:
        """See Group; an operation that came to nothing has raised."""

    def set_timeout(self, timeout_s: float) -> None:
        """See Group."""
        self._timeout = timedelta(seconds=timeout_s)

    def close(self) -> None:
        """See Group. A receive that times out closes its pair for good, which ends all waits on it."""
        for peer in range(self._shard.size):
            if peer != self._shard.rank:
                with suppress(RuntimeError):  # the time-out that closes the pair
                    never = self._group.recv([torch.empty(1, dtype=torch.uint8)], peer, CLOSE_TAG)
                    never.wait(timedelta(milliseconds=1))

    def _run(self, start: Callable[[], Work]) -> None:
        try:
            start().wait(self._timeout)
        except RuntimeError as error:
            raise RankLost(first_line(error)) from error


def file_store(path: Path, size: int, timeout_s: float) -> FileStore:
    """Where the ranks leave their addresses for each other."""
    store = FileStore(str(path), size)
    store.set_timeout(timedelta(seconds=timeout_s))
    return store


def first_line(error: BaseException) -> str:
    """The part of torch's message that is meant for people."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
