"""Control groups of both versions, where this machine lets us make them.

A group freezes processes without a signal, gives them a share of a CPU, or kills them for memory.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
V1_FREEZER, V1_CPU, V1_MEMORY = ROOT / "freezer", ROOT / "cpu", ROOT / "memory"
V2_ROOTS = (ROOT, ROOT / "unified")
CPU_PERIOD_US = 100_000


def _writable(folder: Path, needed: str) -> bool:
    """Whether a group with this file can be made there."""
    probe = folder / f"tandem-probe-{os.getpid()}"
    try:
        probe.mkdir()
    except OSError:
        return False
    try:
        return os.access(probe / needed, os.W_OK)
    finally:
        probe.rmdir()


def freezers() -> dict[str, Path]:
    """By version the folder where groups can be made that freeze."""
    found = [("v1", V1_FREEZER, "freezer.state"), *(("v2", root, "cgroup.freeze") for root in V2_ROOTS)]
    return {version: folder for version, folder, needed in found if _writable(folder, needed)}


def has_cpu_quota() -> bool:
    """Whether groups can be given a share of a CPU here."""
    return _writable(V1_CPU, "cpu.cfs_quota_us")


def has_memory_limit() -> bool:
    """Whether groups can be given a limit of memory here."""
    return _writable(V1_MEMORY, "memory.limit_in_bytes")


@contextlib.contextmanager
def group(folder: Path, pid: int) -> Iterator[Path]:
    """A new group with one process in it, which goes back where it came from."""
    made = folder / f"tandem-{os.getpid()}-{pid}"
    made.mkdir()
    home = folder / _home(folder, pid).lstrip("/")
    try:
        (made / "cgroup.procs").write_text(str(pid))
        yield made
    finally:
        with contextlib.suppress(ProcessLookupError):
            (home / "cgroup.procs").write_text(str(pid))
        _remove(made)


def _home(folder: Path, pid: int) -> str:
    """Path of a process's group below the hierarchy."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if folder.name in controllers.split(",") or (folder in V2_ROOTS and not controllers):
            return path
    return "/"


def _remove(folder: Path) -> None:
    """A group can be removed a moment after its last process has left."""
    for _ in range(200):
        with contextlib.suppress(OSError):
            folder.rmdir()
            return
        time.sleep(0.01)


def freeze(made: Path, *, frozen: bool) -> None:
    """Freeze or thaw, and wait until it has happened."""
    if (made / "freezer.state").exists():
        word = "FROZEN" if frozen else "THAWED"
        (made / "freezer.state").write_text(word)
        _await(lambda: (made / "freezer.state").read_text().strip() == word)
    else:
        (made / "cgroup.freeze").write_text("1" if frozen else "0")
        want = f"frozen {int(frozen)}"
        _await(lambda: want in (made / "cgroup.events").read_text())


def limit_cpu(made: Path, share: float) -> None:
    """So much of one CPU, for all processes of the group together."""
    (made / "cpu.cfs_period_us").write_text(str(CPU_PERIOD_US))
    (made / "cpu.cfs_quota_us").write_text(str(int(share * CPU_PERIOD_US)))


def num_throttled(made: Path) -> int:
    """Periods in which the group had to wait for its next share."""
    lines = dict(line.split() for line in (made / "cpu.stat").read_text().splitlines())
    return int(lines["nr_throttled"])


def limit_memory(made: Path, num_bytes: int) -> None:
    """Whoever needs more is killed by the kernel. What the process holds already is not counted in v1."""
    (made / "memory.limit_in_bytes").write_text(str(num_bytes))


def _await(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("the group did not change its state")
