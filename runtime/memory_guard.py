"""How full the memory is that this process may have, and when that is too full for new work.

The kernel kills a process of a full control group without a word. What it takes back before that, pages of
files, does not count as used: reading a checkpoint fills a group with them. Groups are nested, and each may
have a limit.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from runtime.clock import Clock, SystemClock
from runtime.errors import Overloaded

logger = logging.getLogger(__name__)

LOOK_S = 0.25
"""A share that was read this short a time ago is taken again: reading takes some 100 µs."""

RETRY_AFTER_S = 1.0
"""The hint that goes with a refusal."""


@dataclass(frozen=True)
class Group:
    """A control group: its folder and the names of its files."""

    folder: Path
    limit: str
    usage: str
    prefix: str
    """Of the lines of `memory.stat` that count the groups below, too."""

    def share(self) -> float:
        """Used of the limit; 0 without a limit. OSError if the group is gone or not ours to see."""
        limit = (self.folder / self.limit).read_text().strip()
        if limit == "max":
            return 0.0
        stat = dict(line.split(maxsplit=1) for line in (self.folder / "memory.stat").read_text().splitlines())
        of_files = sum(int(stat.get(f"{self.prefix}{age}_file", 0)) for age in ("active", "inactive"))
        used = int((self.folder / self.usage).read_text()) - of_files
        return max(used, 0) / max(int(limit), 1)


class MemoryView:
    """The groups that this process started in, its own and those around it, and the machine."""

    def __init__(self, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> None:
        self._meminfo = proc / "meminfo"
        membership = proc / "self" / "cgroup"
        lines = membership.read_text().splitlines() if membership.exists() else []
        self._groups = [group for line in lines for group in _groups(line, cgroups)]

    def share(self) -> float:
        """Of the limit that is nearest, 0 to 1."""
        return max((_share_of_machine(self._meminfo), *_shares(self._groups)))


class MemoryGuard:
    """Refuses new work while more than a share of the memory is used. One thread."""

    def __init__(
        self, max_share: float, read: Callable[[], float] | None = None, clock: Clock | None = None
    ) -> None:
        self._max_share = max_share
        self._read = read or MemoryView().share
        self._clock = clock or SystemClock()
        self._read_s = -LOOK_S
        self._share = 0.0
        self._is_full = False

    def share(self) -> float:
        """Of the memory that is used, 0 to 1."""
        now = self._clock.now()
        if now - self._read_s >= LOOK_S:
            self._read_s = now
            self._share = self._read()
        return self._share

    def check(self) -> None:
        """Overloaded if nothing new should begin here."""
        share = self.share()
        is_full = share > self._max_share
        if is_full and not self._is_full:
            logger.warning("%.1f %% of the memory is used: new requests are refused", 100 * share)
        self._is_full = is_full
        if is_full:
            raise Overloaded("memory is almost full; try again", retry_after_s=RETRY_AFTER_S, retryable=True)


def _groups(membership: str, cgroups: Path) -> Iterator[Group]:
    """Groups with a limit of memory named by one line of /proc/self/cgroup, of version 1 or 2."""
    _, controllers, path = membership.split(":", 2)
    if not controllers:
        for folder in _chain(cgroups, path):
            yield Group(folder, "memory.max", "memory.current", "")
    elif "memory" in controllers.split(","):
        for folder in _chain(cgroups / "memory", path):
            yield Group(folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")


def _chain(root: Path, path: str) -> list[Path]:
    """A group and those around it; in a container that names it from outside, the root, which is its own."""
    folder = root / path.lstrip("/")
    if not folder.is_dir():
        return [root]
    return [folder, *(each for each in folder.parents if each.is_relative_to(root))]


def _shares(groups: Iterable[Group]) -> Iterator[float]:
    for group in groups:
        try:
            yield group.share()
        except OSError:
            pass  # the outermost group of version 2 has no limit; others may be gone


def _share_of_machine(meminfo: Path) -> float:
    if not meminfo.exists():
        return 0.0
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    total, available = (int(lines[name].split()[0]) for name in ("MemTotal", "MemAvailable"))
    return 1 - available / total
