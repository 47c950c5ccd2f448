"""Inside a helper process (`helper`): answers, and the limits that the kernel holds it to."""

import contextlib
import json
import os
import resource
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

MAX_CPU_S = 1.0
"""For one question."""

MAX_BYTES = 256 << 20
"""Beyond what the process takes when it is ready."""

READY = {"ready": True}


def ready() -> Iterator[dict[str, Any]]:
    """Say so, and give the questions one by one until there are no more.

    From here on memory is limited, no file can be written, and nothing goes to the gateway's log: a library's
    last words may quote a client.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MAX_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)
    answer(READY)
    for line in sys.stdin:
        yield json.loads(line)


@contextlib.contextmanager
def limited_time() -> Iterator[None]:
    """MAX_CPU_S for what is inside: SIGPROF's default action ends the process, whatever a library does."""
    signal.setitimer(signal.ITIMER_PROF, MAX_CPU_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def answer(message: Mapping[str, object]) -> None:
    """One line to the gateway."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()
