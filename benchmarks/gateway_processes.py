"""The processes of `make bench-gateway`: gateways, echo workers, clients, each bound to its cores."""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.gateway_load import NUM_WORKERS, Case, Stamps

READY = re.compile(r"listening http=http://(\S+) grpc=(\S+) internal=(\S+)")
READY_TIMEOUT_S = 30.0
CASE_TIMEOUT_S = 120.0


def spawn(cores: Sequence[int], *arguments: str) -> subprocess.Popen[str]:
    """A Python process of ours on these cores."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )


@contextlib.contextmanager
def running(cores: Sequence[int], *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """One that is ended behind the context."""
    process = spawn(cores, *arguments)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def run_case(case: Case, cores: Sequence[int], stamps: Path) -> dict[str, Any]:
    """A fresh gateway and fresh workers under one load."""
    Stamps.create(stamps)
    with gateways(case.processes, cores, "--max-concurrent-requests=4096") as found:
        arguments = ("-m", "benchmarks.gateway_echo", found.internal, case.dump(), str(stamps))
        with running(cores[1:2], *arguments) as echo:
            found.workers, found.stamps = echo.pid, str(stamps)
            await_workers(found.http)
            return run_client(case, cores, found)


def run_client(case: Case, cores: Sequence[int], found: "Gateways") -> dict[str, Any]:
    """One load on gateways and workers that run."""
    pids = json.dumps({"gateway": found.pids, "workers": [found.workers]})
    address = found.http if case.face == "http" else found.grpc
    arguments = ("-m", "benchmarks.gateway_client", case.dump(), address, found.stamps, pids)
    with running(cores[1:2], *arguments) as client:
        output, _ = client.communicate(timeout=CASE_TIMEOUT_S)
    return asdict(case) | {"offered": case.offered} | json.loads(output)


@dataclass
class Gateways:
    """Running gateway processes that share their ports."""

    http: str = ""
    grpc: str = ""
    internal: str = ""
    """Of all, with commas between."""
    pids: list[int] = field(default_factory=list)
    workers: int = 0
    """Process id of the echo workers."""
    stamps: str = ""
    """Their file."""

    def add(self, process: subprocess.Popen[str]) -> None:
        """One more is being started: wait until it listens."""
        assert process.stdout is not None
        ready = READY.match(process.stdout.readline())
        assert ready, "the gateway did not start"
        self.http, self.grpc, internal = ready.groups()
        self.internal = ",".join(filter(None, [self.internal, internal]))
        self.pids.append(process.pid)


@contextlib.contextmanager
def gateways(count: int, cores: Sequence[int], *flags: str) -> Iterator[Gateways]:
    """One on the first core; of several, one on each of the first cores."""
    found = Gateways()
    with contextlib.ExitStack() as stack:
        own = ["--log-level=error", *flags]
        if count > 1:
            own.append(f"--peer-directory={stack.enter_context(tempfile.TemporaryDirectory())}")
        for index in range(count):
            ports = [address.rpartition(":")[2] or "0" for address in (found.http, found.grpc)]
            arguments = [f"--http-port={ports[0]}", f"--grpc-port={ports[1]}", *own]
            found.add(stack.enter_context(running([cores[index]], "-m", "gateway", *arguments)))
        yield found


def await_workers(http: str) -> None:
    """Until all workers are ready."""
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline_s:
        workers = httpx.get(f"http://{http}/debug/state", trust_env=False).json()["workers"]
        if sum(worker["state"] == "ready" for worker in workers) == NUM_WORKERS:
            return
        time.sleep(0.1)
    raise SystemExit("the echo workers did not become ready")
