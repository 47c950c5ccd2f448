"""Faults of worker processes. Each proves that it took effect: a fault that did nothing fails the test."""

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from tests.e2e.harness import Up, eventually

SHORT_STALL_S = 1.2
"""Shorter than what aborts anything."""

LONG_STALL_S = 4.0
"""Twice what makes a worker count as hung."""


@dataclass(frozen=True)
class Victim:
    """A process of a live worker."""

    worker_id: str
    pid: int
    num_attempts: int
    """On it when it was chosen."""
    rank: int = 0
    """Whose process that is."""

    def __str__(self) -> str:
        return f"{self.worker_id}, rank {self.rank}," if self.rank else self.worker_id


def process_state(pid: int) -> str | None:
    """The letter in /proc/PID/stat; None if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None


def kill(pid: int) -> None:
    """kill -9, until the process is gone."""
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: process_state(pid) in (None, "Z"), 5, f"the end of {pid}")


def stall(pid: int, seconds: float) -> None:
    """SIGSTOP, hold, SIGCONT; stopped all the while and not after."""
    os.kill(pid, signal.SIGSTOP)
    try:
        eventually(lambda: process_state(pid) == "T", 1, f"{pid} stopped")
        time.sleep(seconds)
        state = process_state(pid)
        assert state == "T", f"{pid} did not stay stopped"
    finally:
        os.kill(pid, signal.SIGCONT)
    eventually(lambda: process_state(pid) != "T", 1, f"{pid} running")


FAULTS: dict[str, Callable[[int], None]] = {
    "kill": kill,
    "short stall": lambda pid: stall(pid, SHORT_STALL_S),
    "long stall": lambda pid: stall(pid, LONG_STALL_S),
}


def choose_victim(up: Up, role: str, rng: random.Random) -> Victim:
    """One worker of the role, a busy one if there is one; of several ranks any of them."""
    found = [Victim(w["id"], w["pid"], w["attempts"]) for w in up.workers(role)]
    busy = [victim for victim in found if victim.num_attempts]
    chosen = rng.choice(sorted(busy or found, key=lambda victim: victim.worker_id))
    ranks = [chosen.pid, *other_ranks(chosen.pid)]
    number = rng.randrange(len(ranks)) if len(ranks) > 1 else 0
    return replace(chosen, pid=ranks[number], rank=number)


def other_ranks(pid: int) -> list[int]:
    """Processes of a worker's ranks behind the first."""
    children = psutil.Process(pid).children()
    return [child.pid for child in children if "worker.lanes.follower" in child.cmdline()]
