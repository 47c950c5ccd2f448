"""Arms fault points of running processes, and proves that they took effect."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.faultpoints import POINTS


class FaultPoints:
    """The folder that the processes of one fleet look at (runtime/faultpoints.py)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def arm(self, name: str, action: str) -> None:
        """Whoever gets there next does it: `crash`, `hang` or `slow SECONDS`."""
        assert name in POINTS, name
        (self.folder / f"{name}.hits").unlink(missing_ok=True)
        draft = self.folder / f"draft-{name}"
        draft.write_text(action)
        draft.rename(self.folder / name)

    def hits(self, name: str) -> list[int]:
        """Pids that were disturbed at this point since it was armed."""
        path = self.folder / f"{name}.hits"
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def wait_hit(self, name: str, timeout_s: float = 20.0) -> int:
        """The pid of the first process that was disturbed there."""
        end_s = time.monotonic() + timeout_s
        while not (hits := self.hits(name)):
            in_time = time.monotonic() < end_s
            assert in_time, f"nobody came to {name}"
            time.sleep(0.005)
        return hits[0]

    @contextmanager
    def armed(self, name: str, action: str) -> Iterator[None]:
        """Armed inside the block; fails if nobody was disturbed."""
        self.arm(name, action)
        try:
            yield
            hits = self.hits(name)
            assert hits, f"{action} at {name} did nothing"
        finally:
            self.release(name)

    def release(self, name: str) -> None:
        """Disarm a point, and let go whoever hangs there."""
        for path in self.folder.glob(f"{name}*"):
            if path.suffix != ".hits":
                path.unlink(missing_ok=True)
