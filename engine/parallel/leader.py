"""Rank 0 of a tensor-parallel worker: it tells the other ranks each step what it does itself.

Two channels lead to every follower. `commands` is the engine thread's: what writes, or computes, in one order
everywhere. `links` hands over the ends of further channels, one for each KV link.

A follower that ends is noticed by a thread that waits for its process, one that hangs by the deadline of the
next collective operation or message. Either way the group is closed, so that nobody stays blocked in it, and
the worker is told, once.
"""

import logging
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from engine.kv_pool import KvPool, LocalKvPool
from engine.models.decoder import Decoder
from engine.models.inputs import FinalRows
from engine.models.llama import Llama
from engine.parallel.errors import RankLost
from engine.parallel.groups import START_TIMEOUT_S, Group, open_group
from engine.parallel.layers import parallelize
from engine.parallel.led_pool import LedKvPool
from engine.parallel.led_steps import LedSteps
from engine.parallel.member import Member
from engine.parallel.shard import Shard
from engine.parallel.wire import Channel, Inputs, Ints, Message, Op, encode, raw
from engine.step.spec import StepSpec
from engine.step.step_ranks import StepRanks
from kernels.attention import AttentionBatch
from runtime.limits import RANK_TIMEOUT_S

logger = logging.getLogger(__name__)

LOAD_TIMEOUT_S = 1800.0
"""For a follower's start: torch and its shard of the checkpoint."""

CAUSE_TIMEOUT_S = 0.5
"""How long the cause of a fault may take to be known: a process's end, behind that of its sockets."""


class Leader:
    """The ranks of one worker; see engine.parallel.ranks.Ranks."""

    def __init__(self, members: Sequence[Member], store: Path, device: torch.device) -> None:
        self.shard = Shard(0, len(members) + 1)
        self.members = members
        self._store = store
        self._device = device
        self._group: Group | None = None
        self._on_lost: Callable[[str], None] = logger.error
        self._lock = threading.Lock()
        self._closing = False
        self._lost = threading.Event()
        self._reason = ""

    def lead_model(self, module: Llama, vocab_size: int) -> Decoder:
        """See Ranks. Waits until every follower has its shard; RankLost if one cannot start."""
        try:
            for member in self.members:
                member.commands.set_timeout(LOAD_TIMEOUT_S)
                member.commands.expect(Op.READY)
                member.commands.set_timeout(START_TIMEOUT_S)
            group = self._group = open_group(self._store, self.shard, self._device)
        finally:
            shutil.rmtree(self._store.parent, ignore_errors=True)
        parallelize(module, self.shard, group, vocab_size)
        return LedModel(self, module, group)

    def lead_pool(self, pool: LocalKvPool) -> KvPool:
        """See Ranks."""
        self.tell(Op.ALLOCATE, [pool.num_blocks, pool.num_host_blocks])
        return LedKvPool(self, pool)

    def connect(self, rank: int, link: int) -> Channel:
        """See Ranks."""
        return self.members[rank - 1].connect(link)

    def lead_steps(self, module: Decoder, spec: StepSpec) -> StepRanks:
        """See Ranks."""
        assert isinstance(module, LedModel)
        return LedSteps(self, module.shard, module.group, spec)

    def confirm(self) -> None:
        """See Ranks."""
        assert self._group is not None
        with self.leading():
            self._group.check()

    def tell(self, op: Op, *arrays: Sequence[int] | Ints, payload: Tensor | None = None) -> None:
        """See Ranks."""
        data = b"" if payload is None else raw(payload)
        message = encode(op, *arrays, num_payload_bytes=len(data))
        with self.leading():
            for member in self.members:
                member.commands.send(message, data)

    def answers(self, op: Op) -> list[Message]:
        """See Ranks."""
        with self.leading():
            return [member.commands.expect(op) for member in self.members]

    def call_roll(self) -> None:
        """See Ranks."""
        self.tell(Op.ROLL)
        self.answers(Op.PRESENT)

    @contextmanager
    def leading(self) -> Iterator[None]:
        """Around whatever needs the other ranks: a RankLost ends the group, and says why if that is known."""
        try:
            yield
        except RankLost as error:
            watched = any(member.process is not None for member in self.members)
            if not self._lost.wait(CAUSE_TIMEOUT_S if watched else 0):
                self._lose(str(error))
            raise RankLost(self._reason) from error

    def watch(self, on_lost: Callable[[str], None]) -> None:
        """See Ranks."""
        self._on_lost = on_lost
        if self._group is not None:
            self._group.set_timeout(RANK_TIMEOUT_S)
        for member in self.members:
            member.commands.set_timeout(RANK_TIMEOUT_S)
            if member.process is not None:
                threading.Thread(
                    target=self._await_end, args=(member, member.process), name="rank-watch", daemon=True
                ).start()

    def close(self) -> None:
        """See Ranks."""
        with self._lock:
            self._closing = True
        if self._group is not None:
            self._group.close()
        for member in self.members:
            member.close()
        shutil.rmtree(self._store.parent, ignore_errors=True)

    def _await_end(self, member: Member, process: "subprocess.Popen[bytes]") -> None:
        code = process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        self._lose(f"{member} {how}")

    def _lose(self, reason: str) -> None:
        with self._lock:
            if self._closing or self._reason:
                return
            self._reason = reason
        self._lost.set()
        if self._group is not None:
            self._group.close()
        logger.error("%s", reason)
        self._on_lost(reason)


class LedModel:
    """The whole model: followers compute their shards beside rank 0's."""

    def __init__(self, leader: Leader, shard: Llama, group: Group) -> None:
        self._leader = leader
        self.shard = shard
        self.group = group

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        kv_group: Tensor,
        slot_mapping: Tensor,
        attention: AttentionBatch,
        final: FinalRows | None = None,
    ) -> Tensor:
        """See Decoder; `kv_group` is rank 0's part of the first group."""
        inputs = Inputs(token_ids, positions, slot_mapping, attention, final)
        self._leader.tell(Op.FORWARD, *inputs.arrays())
        with self._leader.leading():
            return self.shard.forward(token_ids, positions, kv_group, slot_mapping, attention, final)

    def logits(self, hidden: Tensor) -> Tensor:
        """See Decoder."""
        self._leader.tell(Op.LOGITS, hidden.shape)
        with self._leader.leading():
            self.group.broadcast(hidden.contiguous())
            return self.shard.logits(hidden)
