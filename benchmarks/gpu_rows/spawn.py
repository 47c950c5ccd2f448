"""Starts a section's process and reads what it says, with a limit on every silence."""

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from benchmarks.gpu_rows.job import Job, Message
from benchmarks.machine import ROOT

PATIENCE = 4.0
"""A row, or a start, may take so many times its estimate."""
LEAST_PATIENCE_S = 100.0
"""A row that is the first to launch its kernels compiles them."""
GRACE_S = 5.0
"""Beyond the time that a job was given."""

Limits = Mapping[str | None, float]
"""Estimated seconds by row; None: until the first row."""


class ChildDied(Exception):
    """It ended early, or was ended; the message says how."""


PROGRAM = (sys.executable, "-m", "benchmarks.gpu_rows.child")


def spawn(job: Job, limits: Limits, program: Sequence[str] = PROGRAM) -> Iterator[Message]:
    """All messages; ChildDied behind the last one unless the process ended well."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*program, job.dump()],
            stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT, start_new_session=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )  # fmt: skip
        try:
            yield from _messages(process, job, limits)
            if process.wait(LEAST_PATIENCE_S):
                raise ChildDied(f"exit code {process.returncode}: {_last_words(log)}")
        except subprocess.TimeoutExpired:
            raise ChildDied("it did not end") from None
        finally:
            _end(process)


def _messages(process: "subprocess.Popen[str]", job: Job, limits: Limits) -> Iterator[Message]:
    lines: queue.Queue[str | None] = queue.Queue()
    assert process.stdout is not None
    threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
    ends_s = time.monotonic() + job.seconds + GRACE_S
    current: str | None = None
    while True:
        patience_s = max(PATIENCE * limits.get(current, 0.0), LEAST_PATIENCE_S)
        try:
            line = lines.get(timeout=max(min(patience_s, ends_s - time.monotonic()), 0.0))
        except queue.Empty:
            raise ChildDied("given up: it took too long") from None
        if line is None:
            return
        message: Message = json.loads(line)
        current = message.get("begin")
        yield message


def _read(stream: IO[str], lines: "queue.Queue[str | None]") -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _last_words(log: IO[Any]) -> str:
    log.seek(0)
    lines = log.read().strip().splitlines()
    return lines[-1][:300] if lines else "no word"


def _end(process: "subprocess.Popen[str]") -> None:
    """It, and what it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    assert process.stdout is not None
    process.stdout.close()
