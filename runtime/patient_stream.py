"""A text stream to a file, pipe or terminal that may stand still: whoever writes never waits for it.

1. `write` puts the text into a bounded queue; what finds it full is dropped and counted.
2. A thread takes everything that waits and writes it in one call, which may take as long as it likes.
3. As soon as there is room again it says how much is missing. What the other end refuses (a full disk, a
   closed pipe) is dropped, too.
4. A process that ends gives the thread a moment with `drain`; one that is killed loses what waits.
"""

import io
import os
import threading
from collections import deque

MAX_WAITING_BYTES = 1 << 20
"""Some 10,000 lines; as much again may be in the hands of the thread."""


class PatientStream(io.TextIOBase):
    """Writes to a file descriptor, which it does not own. Any thread may use it."""

    def __init__(self, fd: int, max_waiting_bytes: int = MAX_WAITING_BYTES) -> None:
        self._fd = fd
        self._max_waiting_bytes = max_waiting_bytes
        self._waiting: deque[bytes] = deque()
        self._num_waiting_bytes = 0
        self._num_untold = 0
        """Dropped since the last time that it was said."""
        self._changed = threading.Condition()
        self._is_writing = False
        self.num_dropped = 0
        """Texts that were not written; a line of a log is one."""
        threading.Thread(target=self._run, name="stderr", daemon=True).start()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Of what is written."""
        return "utf-8"

    def fileno(self) -> int:
        """The descriptor behind it."""
        return self._fd

    def isatty(self) -> bool:
        """Whether a person reads it."""
        return os.isatty(self._fd)

    def writable(self) -> bool:
        """Yes."""
        return True

    def write(self, text: str) -> int:
        """Queue a text, or drop it; never waits."""
        data = text.encode("utf-8", "backslashreplace")
        with self._changed:
            if self._num_waiting_bytes + len(data) > self._max_waiting_bytes:
                self._drop(1)
            else:
                self._waiting.append(data)
                self._num_waiting_bytes += len(data)
                self._changed.notify_all()
        return len(text)

    def drain(self, timeout_s: float) -> bool:
        """Wait until nothing waits; False if it took longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._is_writing, timeout_s)

    def _run(self) -> None:
        while True:
            texts = self._take()
            num_written = self._write_out(texts)
            with self._changed:
                self._drop(len(texts) - num_written)
                self._is_writing = False
                self._changed.notify_all()

    def _take(self) -> list[bytes]:
        """Everything that waits, once there is something, behind what is to be said of lost texts."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting)
            texts = list(self._waiting)
            if self._num_untold:
                texts[0] = b"%d log lines were dropped\n" % self._num_untold + texts[0]
            self._waiting.clear()
            self._num_waiting_bytes = self._num_untold = 0
            self._is_writing = True
        return texts

    def _write_out(self, texts: list[bytes]) -> int:
        """How many were written in full."""
        left = memoryview(b"".join(texts))
        num_bytes = len(left)
        try:
            while left:
                left = left[os.write(self._fd, left) :]
        except OSError:
            pass  # nobody takes it: there is no place to say so
        num_left = num_bytes - len(left)
        ends = 0
        for count, text in enumerate(texts):
            ends += len(text)
            if ends > num_left:
                return count
        return len(texts)

    def _drop(self, count: int) -> None:
        self.num_dropped += count
        self._num_untold += count
