"""Starts the real thing for end-to-end tests: `tandem up` with real processes on free ports."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil

import tandem
from runtime import faultpoints
from tests.faults.points import FaultPoints

READY = re.compile(r"^ready http=(\S+) grpc=(\S+)$", re.MULTILINE)
START_TIMEOUT_S = 90.0
LIVE_COUNTS = ("blocks_used", "requests_running", "requests_waiting", "transfers", "attempts")
"""Of a worker; zero when it is quiet."""
DEADLINE_S = 30.0
MODEL = Path(tandem.__file__).parent / "demo_model"


def eventually(probe: Callable[[], bool], timeout_s: float = DEADLINE_S, what: str = "condition") -> float:
    """Poll until true; returns the seconds it took."""
    start = time.monotonic()
    while not probe():
        if time.monotonic() - start > timeout_s:
            raise AssertionError(f"{what} did not hold within {timeout_s} s")
        time.sleep(0.01)
    return time.monotonic() - start


def kv_bytes_per_token() -> int:
    """Of the bundled model and its draft, which travels with it; KV is fp32 on a CPU."""
    configs = [json.loads((folder / "config.json").read_text()) for folder in (MODEL, MODEL / "draft")]
    return sum(2 * c["num_hidden_layers"] * c["num_key_value_heads"] * c["head_dim"] * 4 for c in configs)


def held_by(owner: str, state: dict[str, Any], names: tuple[str, ...]) -> dict[str, int]:
    """Counts of one process's /debug/state that are not zero, and ledgers that are not balanced."""
    counts = {name: state[name] for name in names}
    for name, account in state["ledger"].items():
        counts[f"ledger of {name}"] = account["taken"] - account["returned"]
    return {f"{owner}: {name}": count for name, count in counts.items() if count}


class Up:
    """One running `tandem up`."""

    def __init__(self, *flags: str) -> None:
        command = [sys.executable, "-m", "tandem", "up", "--http-port=0", "--grpc-port=0", *flags]
        self.points = FaultPoints(Path(tempfile.mkdtemp(prefix="tandem-faults-")))
        environment = os.environ | {"PYTHONUNBUFFERED": "1", faultpoints.VARIABLE: str(self.points.folder)}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        self.stdout, self.stderr = "", ""
        self._readers = [
            threading.Thread(target=self._read, args=(name,), daemon=True) for name in ("stdout", "stderr")
        ]
        for reader in self._readers:
            reader.start()
        eventually(self._is_up, START_TIMEOUT_S, "tandem up")
        match = READY.search(self.stdout)
        assert match, f"no ready line\n{self.stdout}\n{self.stderr}"
        self.http, self.grpc = match.groups()
        self.client = httpx.Client(base_url=self.http, timeout=60)

    def _read(self, name: str) -> None:
        for line in getattr(self.process, name):
            setattr(self, name, getattr(self, name) + line)

    def _is_up(self) -> bool:
        return self.process.poll() is not None or READY.search(self.stdout) is not None

    def state(self) -> dict[str, Any]:
        """The gateway's /debug/state."""
        return self.client.get("/debug/state").json()

    def workers(self, role: str | None = None) -> list[dict[str, Any]]:
        """The live workers' own /debug/state with their pids."""
        found = []
        for worker in self.state()["workers"]:
            if worker["state"] != "down" and role in (None, worker["role"]):
                own = self.client.get(f"{worker['http']}/debug/state").json()
                found.append(own | {"pid": worker["pid"], "http": worker["http"]})
        return found

    def is_quiet(self) -> bool:
        """Nothing is held anywhere, and every ledger is balanced: the state after the last request."""
        return not self.held()

    def held(self) -> dict[str, int]:
        """What any process holds for requests: empty is LEAK0."""
        found = held_by("gateway", self.state(), ("requests",))
        for worker in self.workers():
            found |= held_by(worker["id"], worker, LIVE_COUNTS)
        return found

    def metric(self, url: str, name: str) -> float:
        """Sum of a metric's samples at one process."""
        text = self.client.get(f"{url}/metrics").text
        lines = [line for line in text.splitlines() if re.match(rf"{name}(\{{|\s)", line)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def complete(self, prompt: Any, **fields: Any) -> dict[str, Any]:
        """One non-streaming completion; the response's JSON."""
        body = {"prompt": prompt, "model": self.model, "return_token_ids": True} | fields
        response = self.client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        return response.json()

    @property
    def model(self) -> str:
        """The served model's name."""
        return self.client.get("/v1/models").json()["data"][0]["id"]

    def stop(self) -> None:
        """SIGTERM; everything must be gone within 30 s with exit code 0."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(30)
        finally:
            self.kill()
        assert code == 0, self.stderr
        assert not [child for child in children if child.is_running() and child.status() != "zombie"]
        assert "Traceback" not in self.stderr, self.stderr
        assert "never retrieved" not in self.stderr, self.stderr

    def kill(self) -> None:
        """End the process if it is still there."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        self.client.close()
        shutil.rmtree(self.points.folder, ignore_errors=True)
        for reader, name in zip(self._readers, ("stdout", "stderr"), strict=True):
            reader.join(10)
            getattr(self.process, name).close()
