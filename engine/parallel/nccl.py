"""The collectives of a tensor-parallel group on GPUs.

NCCL's waits are on the stream: the host goes on, and would block for ever at its next look at a result if a
rank were gone. So a watcher looks at the oldest operation that has not completed, and aborts the communicator
when it is overdue; what the host waits for then returns, with anything in it. torch's own watchdog, which
would take the process down without a word to its requests, is switched off.

Operations are synchronous ones (`asyncOp = False`): they are started on the current stream itself, so that
there is no second stream to wait for and tensors live as long as those of any kernel. They return no `Work`;
an event of our own stands behind each.

Within a capture nothing runs, and to look at an event that was captured is an error: there is none, and
torch's watchdog is not told of the operation either. Instead one event stands behind each replay. Events of
before may be looked at while another thread captures, because steps are captured in mode "thread_local".
`gather` is a group of sends and receives and a copy on the current stream, so it can be captured like the
others; the warm-up of each shape has made the connections that its sizes need. Eager and captured operations
may alternate on one communicator (NCCL_GRAPH_MIXING_SUPPORT, which is the default).

`ncclCommAbort` first tells kernels to leave, also those that are started later, and frees the communicator
only when no captured graph refers to it: a replay beside an abort ends, and the abort may wait for ever.

Read in torch (ProcessGroupNCCL.cpp: `collective`, `gather`; csrc/cuda/nccl.cpp) and NCCL 2.30 (init.cc,
enqueue.cc); not yet run.
"""

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C import _DistBackendError as NcclError
from torch._C._distributed_c10d import AllreduceOptions, BroadcastOptions, GatherOptions

from engine.parallel.errors import RankLost
from engine.parallel.groups import START_TIMEOUT_S, file_store, first_line
from engine.parallel.shard import Shard
from runtime.clock import Clock, SystemClock

logger = logging.getLogger(__name__)

LOOK_S = 0.25
"""How often the watcher looks."""


class NcclGroup:
    """One communicator; see engine.parallel.groups.Group."""

    def __init__(self, group: Any, shard: Shard, timeout_s: float, clock: Clock) -> None:
        self._group = group
        self._shard = shard
        self._timeout_s = timeout_s
        self._clock = clock
        # What is in flight, by the event behind it, and when it was started, oldest first; the watcher takes
        # out what has completed.
        self._in_flight: deque[tuple[torch.cuda.Event, float]] = deque()
        self._closed = threading.Event()
        self._aborting = threading.Lock()
        threading.Thread(target=self._watch, name="nccl-watch", daemon=True).start()

    @classmethod
    def open(
        cls, path: Path, shard: Shard, device: torch.device, timeout_s: float = START_TIMEOUT_S
    ) -> "NcclGroup":
        """See `engine.parallel.groups.open_group`."""
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
        os.environ["TORCH_NCCL_ENABLE_MONITORING"] = "0"
        from torch._C._distributed_c10d import ProcessGroupNCCL

        options = ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=timeout_s)
        torch.cuda.set_device(device)
        try:
            store = file_store(path, shard.size, timeout_s)
            group: Any = ProcessGroupNCCL(store, shard.rank, shard.size, options)
            group.eager_connect_single_device(device)
        except RuntimeError as error:
            raise RankLost(f"NCCL: {first_line(error)}") from error
        return cls(group, shard, timeout_s, SystemClock())

    def all_reduce(self, x: Tensor) -> Tensor:
        """See Group; in place."""
        options = AllreduceOptions()
        options.asyncOp = False
        self._run(lambda: self._group.allreduce([x], options))
        return x

    def gather(self, x: Tensor) -> Tensor | None:
        """See Group."""
        options = GatherOptions()
        options.rootRank, options.asyncOp = 0, False
        if self._shard.rank != 0:
            self._run(lambda: self._group.gather([], [x], options))
            return None
        parts = x.new_empty(self._shard.size, *x.shape)
        self._run(lambda: self._group.gather([list(parts)], [x], options))
        return parts

    def broadcast(self, x: Tensor) -> None:
        """See Group."""
        options = BroadcastOptions()
        options.rootRank, options.asyncOp = 0, False
        self._run(lambda: self._group.broadcast([x], options))

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """See Group."""
        self.check()
        yield
        self._set_deadline()

    def check(self) -> None:
        """See Group."""
        if self._closed.is_set():
            raise RankLost("the communicator was aborted")

    def set_timeout(self, timeout_s: float) -> None:
        """See Group."""
        self._timeout_s = timeout_s

    def close(self) -> None:
        """See Group. Aborting can itself hang while a peer is half dead, so nobody waits for it."""
        with self._aborting:
            if self._closed.is_set():
                return
            self._closed.set()
        threading.Thread(target=self._group.abort, name="nccl-abort", daemon=True).start()

    def _run(self, start: Callable[[], None]) -> None:
        self.check()
        try:
            start()
        except NcclError as error:
            raise RankLost(f"NCCL: {first_line(error)}") from error
        if not torch.cuda.is_current_stream_capturing():
            self._set_deadline()

    def _set_deadline(self) -> None:
        """For everything that was started on the current stream."""
        event = torch.cuda.Event()
        event.record()
        self._in_flight.append((event, self._clock.now()))

    def _watch(self) -> None:
        while not self._closed.wait(LOOK_S):
            self.look()

    def look(self) -> None:
        """Close the group if something in it is overdue."""
        while self._in_flight and self._in_flight[0][0].query():
            self._in_flight.popleft()
        if self._in_flight and self._clock.now() - self._in_flight[0][1] > self._timeout_s:
            logger.error("a collective operation has not completed in %.0f s", self._timeout_s)
            self.close()
