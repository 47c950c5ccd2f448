"""A follower as rank 0 knows it."""

import socket
import subprocess
import threading
from dataclasses import dataclass, field

from engine.parallel.wire import Channel, Op, encode

EXIT_TIMEOUT_S = 1.0
"""From the end of its channels until a follower is killed."""


@dataclass(frozen=True)
class Member:
    """Another rank."""

    rank: int
    commands: Channel
    links: Channel
    process: subprocess.Popen[bytes] | None = None
    # Held while the end of a link's channel is handed over.
    _connecting: threading.Lock = field(default_factory=threading.Lock)

    def __str__(self) -> str:
        pid = "" if self.process is None else f" (pid {self.process.pid})"
        return f"tensor-parallel rank {self.rank}{pid}"

    def connect(self, link: int) -> Channel:
        """See engine.parallel.ranks.Ranks."""
        ours, theirs = socket.socketpair()
        with theirs, self._connecting:
            self.links.send(encode(Op.LINK, [link]))
            self.links.send_socket(theirs)
        return Channel(ours, str(self), None)

    def close(self) -> None:
        """End it; kill what does not go."""
        self.commands.close()
        self.links.close()
        if self.process is not None:
            try:
                self.process.wait(EXIT_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
