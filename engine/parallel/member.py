"""A follower as rank 0 knows it."""

import subprocess
from dataclasses import dataclass

from engine.parallel.wire import Channel

EXIT_TIMEOUT_S = 1.0
"""From the end of its channels until a follower is killed."""


@dataclass(frozen=True)
class Member:
    """Another rank."""

    rank: int
    commands: Channel
    reads: Channel
    process: subprocess.Popen[bytes] | None = None

    def __str__(self) -> str:
        pid = "" if self.process is None else f" (pid {self.process.pid})"
        return f"tensor-parallel rank {self.rank}{pid}"

    def close(self) -> None:
        """End it; kill what does not go."""
        self.commands.close()
        self.reads.close()
        if self.process is not None:
            try:
                self.process.wait(EXIT_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
