"""The collectives of a tensor-parallel group on GPUs.

NCCL's waits are on the stream: the host goes on, and would block for ever at its next look at a result if a
rank were gone. So a watcher looks at the oldest operation that has not completed, and aborts the communicator
when it is overdue; what the host waits for then returns. torch's own watchdog, which would take the process
down without a word to its requests, is switched off.
"""

import logging
import os
import threading
from collections import deque
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import AllreduceOptions, BroadcastOptions, GatherOptions, Work

from engine.parallel.errors import RankLost
from engine.parallel.groups import file_store, first_line
from engine.parallel.shard import Shard
from runtime.clock import Clock, SystemClock
from runtime.limits import RANK_TIMEOUT_S

logger = logging.getLogger(__name__)

LOOK_S = 0.25
"""How often the watcher looks."""

START_TIMEOUT_S = 120.0
"""For making the communicator."""


class NcclGroup:
    """One communicator; see engine.parallel.groups.Group."""

    def __init__(self, group: Any, shard: Shard, timeout_s: float, clock: Clock) -> None:
        self._group = group
        self._shard = shard
        self._timeout_s = timeout_s
        self._clock = clock
        # Operations in flight with their starts, oldest first; the watcher takes the completed ones out.
        self._works: deque[tuple[Work, float]] = deque()
        self._closed = threading.Event()
        self._aborting = threading.Lock()
        threading.Thread(target=self._watch, name="nccl-watch", daemon=True).start()

    @classmethod
    def open(
        cls, store: Path, shard: Shard, device: torch.device, timeout_s: float = RANK_TIMEOUT_S
    ) -> "NcclGroup":
        """See `engine.parallel.groups.open_group`."""
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
        os.environ["TORCH_NCCL_ENABLE_MONITORING"] = "0"
        from torch._C._distributed_c10d import ProcessGroupNCCL

        options = ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=START_TIMEOUT_S)
        torch.cuda.set_device(device)
        try:
            group: Any = ProcessGroupNCCL(
                file_store(store, shard.size, START_TIMEOUT_S), shard.rank, shard.size, options
            )
            group.eager_connect_single_device(device)
        except RuntimeError as error:
            raise RankLost(f"NCCL: {first_line(error)}") from error
        return cls(group, shard, timeout_s, SystemClock())

    def all_reduce(self, x: Tensor) -> Tensor:
        """See Group; in place."""
        self._run(self._group.allreduce([x], AllreduceOptions()))
        return x

    def gather(self, x: Tensor) -> Tensor | None:
        """See Group."""
        options = GatherOptions()
        options.rootRank = 0
        if self._shard.rank != 0:
            self._run(self._group.gather([], [x], options))
            return None
        parts = x.new_empty(self._shard.size, *x.shape)
        self._run(self._group.gather([list(parts)], [x], options))
        return parts

    def broadcast(self, x: Tensor) -> None:
        """See Group."""
        options = BroadcastOptions()
        options.rootRank = 0
        self._run(self._group.broadcast([x], options))

    def close(self) -> None:
        """See Group. Aborting can itself hang while a peer is half dead, so nobody waits for it."""
        with self._aborting:
            if self._closed.is_set():
                return
            self._closed.set()
        threading.Thread(target=self._group.abort, name="nccl-abort", daemon=True).start()

    def _run(self, work: Work) -> None:
        if self._closed.is_set():
            raise RankLost("the communicator was aborted")
        self._works.append((work, self._clock.now()))
        work.wait()  # on the current stream

    def _watch(self) -> None:
        while not self._closed.wait(LOOK_S):
            while self._works and self._works[0][0].is_completed():
                self._works.popleft()
            if self._works and self._clock.now() - self._works[0][1] > self._timeout_s:
                logger.error("a collective operation has not completed in %.0f s", self._timeout_s)
                self.close()
