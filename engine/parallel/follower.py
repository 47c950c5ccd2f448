"""A rank other than 0: a process that holds a shard of the model and of the KV pool, and does as it is told.

It has no scheduler, no sampler and no opinion. It ends with rank 0: the end of either channel is the end of
that process, and the reading thread notices it even while the other one computes.

KV links are served by what joins it from outside, on threads of its own: the engine knows nothing of them.

    python -m engine.parallel.follower COMMANDS_FD LINKS_FD
"""

import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch

from engine.config import EngineConfig
from engine.device_memory import free_bytes
from engine.facts import KvGroupSpec
from engine.kv_pool import LocalKvPool
from engine.loader import load_checkpoint
from engine.models.llama import Llama
from engine.parallel.errors import RankLost
from engine.parallel.groups import Group, open_group
from engine.parallel.layers import parallelize
from engine.parallel.led_steps import FollowedSteps
from engine.parallel.shard import Shard
from engine.parallel.wire import Channel, Inputs, Message, Op, encode
from engine.step.spec import StepSpec
from runtime import logs
from runtime.errors import StartupError

logger = logging.getLogger(__name__)

LEADER = "tensor-parallel rank 0"


@dataclass(frozen=True, kw_only=True)
class Start:
    """All that a follower must know before its first command."""

    rank: int
    size: int
    path: str
    """Of the checkpoint."""
    store: str
    """File in which the ranks find each other."""
    dtype: str
    device: str
    block_size: int
    max_model_len: int | None

    def to_json(self) -> bytes:
        """As a payload."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, payload: bytes | bytearray) -> "Start":
        """From a payload."""
        return cls(**json.loads(payload))

    def engine_config(self) -> EngineConfig:
        """As far as a shard needs one."""
        return EngineConfig(
            dtype=self.dtype,  # type: ignore[arg-type]  # rank 0 has checked it
            device=self.device,
            block_size=self.block_size,
            max_model_len=self.max_model_len,
        )


class LinkService(Protocol):
    """What serves KV links on a rank other than 0."""

    def begin(self, link: int, channel: Channel) -> None:
        """Serve a link on threads of its own, until its channel ends."""
        ...

    def scatter(self, message: Message) -> bytes:
        """Carry out SCATTER, on the thread that computes; the answer."""
        ...


class Follower:
    """One rank's shard of model and pool; `load` comes first."""

    service: LinkService | None = None
    """If there are KV links."""
    device: torch.device
    """Of weights and pool."""
    _start: Start
    _module: Llama
    _spec: KvGroupSpec
    _dtype: torch.dtype
    _group: Group

    def __init__(self, commands: Channel, links: Channel) -> None:
        self._commands = commands
        self._links = links
        self._pool: LocalKvPool | None = None
        self._steps: FollowedSteps | None = None
        self._handlers: dict[Op, Callable[[Message], None]] = {
            Op.ALLOCATE: self._allocate,
            Op.FORWARD: self._forward,
            Op.LOGITS: self._logits,
            Op.COPY: lambda message: self.pool.copy(0, *message.lists),
            Op.STORE: self._store,
            Op.LOAD: self._load_back,
            Op.ROLL: lambda message: self._commands.send(encode(Op.PRESENT)),
            Op.SCATTER: self._scatter,
            Op.RECORD_STEPS: self._record_steps,
            Op.STEP: lambda message: self.steps.run(message),
            Op.MEASURE: lambda _: self._commands.send(encode(Op.MEASURED, [free_bytes(self.device)])),
            Op.CHANGE_TABLES: lambda message: self.steps.change(message),
        }

    def load(self) -> None:
        """Take the first message, load the shard it asks for, join the group; raises StartupError."""
        start = self._start = Start.from_json(self._commands.expect(Op.START).payload)
        shard = Shard(start.rank, start.size)
        self.device = torch.device(start.device)
        self._module, facts = load_checkpoint(Path(start.path), start.engine_config(), shard=shard)
        self._spec = shard.kv_spec(facts.kv_groups[0])
        self._dtype = getattr(torch, facts.dtype)
        self._commands.send(encode(Op.READY))
        self._group = open_group(Path(start.store), shard, self.device)
        parallelize(self._module, shard, self._group, facts.vocab_size)

    @property
    def pool(self) -> LocalKvPool:
        """This rank's heads of every block."""
        assert self._pool is not None, "ALLOCATE comes first"
        return self._pool

    @property
    def steps(self) -> FollowedSteps:
        """Steps over fixed buffers and this pool."""
        assert self._steps is not None, "RECORD_STEPS comes first"
        return self._steps

    @torch.inference_mode()
    def run(self) -> None:
        """Carry out commands until rank 0 ends; RankLost if a rank is lost in the middle of one."""
        while (message := self._commands.receive()) is not None:
            self._handlers[message.op](message)

    def close(self) -> None:
        """Leave the group."""
        self._group.close()

    def take_links(self) -> None:
        """Hand KV links to the service, on a thread of its own, until rank 0 ends."""
        while (message := self._links.receive()) is not None:
            [[link]] = message.lists
            assert message.op is Op.LINK, message.op
            assert self.service is not None
            self.service.begin(link, Channel(self._links.receive_socket(), LEADER, None))

    def _allocate(self, message: Message) -> None:
        assert self._steps is None, "steps are recorded over the pool that stays"
        [(num_blocks, num_host_blocks)] = message.lists
        self._pool = LocalKvPool(
            [self._spec],
            num_blocks=num_blocks,
            block_size=self._start.block_size,
            num_host_blocks=num_host_blocks,
            device=self.device,
        )

    def _record_steps(self, message: Message) -> None:
        spec = StepSpec.of(message.lists)
        self._steps = FollowedSteps(spec, self._module, self.pool.groups[0], self._group)

    def _forward(self, message: Message) -> None:
        inputs = Inputs.of(message.arrays, self._start.block_size, self.device)
        self._module.forward(
            inputs.token_ids,
            inputs.positions,
            self.pool.groups[0],
            inputs.slot_mapping,
            inputs.attention,
            inputs.final,
        )

    def _logits(self, message: Message) -> None:
        hidden = torch.empty(message.lists[0], dtype=self._dtype, device=self.device)
        self._group.broadcast(hidden)
        self._module.logits(hidden)

    def _store(self, message: Message) -> None:
        block_ids, slots = message.lists
        self.pool.store([block_ids], slots)

    def _load_back(self, message: Message) -> None:
        slots, block_ids = message.lists
        self.pool.load(slots, [block_ids])

    def _scatter(self, message: Message) -> None:
        assert self.service is not None
        self._commands.send(self.service.scatter(message))


def main(argv: Sequence[str], make_service: Callable[[Follower], LinkService] | None = None) -> int:
    """The process; returns its exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # they are for rank 0, which drains first
    logs.setup("rank", "info", "auto")
    commands, links = (socket.socket(fileno=int(fd)) for fd in argv)
    follower = Follower(Channel(commands, LEADER, None), Channel(links, LEADER, None))
    if make_service is not None:
        follower.service = make_service(follower)
    threading.Thread(target=_end_with_leader, args=(follower,), name="links", daemon=True).start()
    try:
        follower.load()
        follower.run()
    except StartupError as error:
        logger.error("%s", error.message)
        return 2
    except RankLost as error:
        logger.error("%s", error)
        return 1
    return 0


def _end_with_leader(follower: Follower) -> None:
    """Whatever the other thread is in the middle of, nobody wants it any more."""
    try:
        follower.take_links()
    finally:
        os._exit(0)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    logs.last_words()
    os._exit(code)  # threads that wait inside gloo cannot be joined
