"""Starts the followers of a tensor-parallel worker: processes of their own, bound to this one's life."""

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.models.config import read_config
from engine.parallel.errors import RankLost
from engine.parallel.follower import Start
from engine.parallel.leader import Leader
from engine.parallel.member import Member
from engine.parallel.ranks import ONE_RANK, Ranks
from engine.parallel.shard import require_divisible
from engine.parallel.wire import Channel, Op, encode
from runtime.config import ENV_PREFIX
from runtime.errors import StartupError
from runtime.limits import RANK_TIMEOUT_S

ROOT = Path(__file__).resolve().parent.parent.parent
"""Where our packages lie: a checkout, or site-packages."""


def start_ranks(
    path: Path, config: EngineConfig, devices: Sequence[str], module: str = "engine.parallel.follower"
) -> Ranks:
    """One rank for each device, this process being the first.

    `devices` are torch's names, "cpu" or "cuda:0"; the first is `config.device`. `module` is what the others
    run: this package's own serves no KV links. Raises StartupError or
    CheckpointError before anything is started if the model cannot be shared among so many.
    """
    if len(devices) == 1:
        return ONE_RANK
    model_config, _ = read_config(path)
    require_divisible(model_config, len(devices))
    store = Path(tempfile.mkdtemp(prefix="tandem-ranks-")) / "store"
    members = [_start(rank, module) for rank in range(1, len(devices))]
    for member, device in zip(members, devices[1:], strict=True):
        start = Start(
            rank=member.rank,
            size=len(devices),
            path=str(path),
            store=str(store),
            dtype=config.dtype,
            device=device,
            block_size=config.block_size,
            max_model_len=config.max_model_len,
        ).to_json()
        member.commands.send(encode(Op.START, num_payload_bytes=len(start)), start)
    return Leader(members, store, torch.device(devices[0]))


@contextmanager
def starting(ranks: Ranks) -> Iterator[None]:
    """Around all that makes an engine of ranks: if it fails they end, and a lost one is a StartupError."""
    try:
        yield
    except RankLost as error:
        ranks.close()
        raise StartupError(f"--tensor-parallel-size {ranks.shard.size}: {error}") from error
    except BaseException:
        ranks.close()
        raise


def _start(rank: int, module: str) -> Member:
    pairs = [socket.socketpair() for _ in range(2)]
    fds = [theirs.fileno() for _, theirs in pairs]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", module, *map(str, fds)],
        pass_fds=fds,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env=_environment(),
    )
    for _, theirs in pairs:
        theirs.close()
    (commands, _), (links, _) = pairs
    peer = f"tensor-parallel rank {rank} (pid {process.pid})"
    return Member(
        rank, Channel(commands, peer, RANK_TIMEOUT_S), Channel(links, peer, RANK_TIMEOUT_S), process
    )


def _environment() -> dict[str, str]:
    """This process's own, with our packages in reach and without our settings: some are secrets."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
    if ROOT.name != "site-packages":
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    return env
