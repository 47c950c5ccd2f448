"""Real processes under random requests and random faults: `make chaos`.

A fault comes when the fleet is whole and no request has met the one before, so that each always has a spare
worker to go to: not one may fail then. The seed fixes the catalogue, what clients do and the order of the
faults; what they meet depends on time.
"""

import argparse
import random
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import httpx
import psutil

from tests.e2e.harness import Up, eventually
from tests.faults.faults import FAULTS, choose_victim
from tests.faults.requests import Request, WrongAnswer, catalogue, perform

NUM_CLIENTS = 6
CATALOGUE_SIZE = 24
WHOLE_AGAIN_S = 90.0
"""Restarted workers import and load on the machine that also serves."""

MAX_KILLS_PER_WORKER = 3
KILL_WINDOW_S = 65.0
"""More deaths than this within a minute are a crash loop, and a worker that is in one stays down."""


@dataclass
class Report:
    """What a soak did and saw."""

    answers: Counter[str] = field(default_factory=Counter)
    """Requests by how they ended."""
    faults: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    """Everything that must not be; empty is a pass."""
    quiet_after_s: float = 0.0
    rss_slopes: dict[str, float] = field(default_factory=dict)
    """MB per minute of each process that lived throughout; none after a run too short to tell."""

    def __str__(self) -> str:
        slopes = ", ".join(f"{name} {slope:+.1f}" for name, slope in self.rss_slopes.items())
        lines = [f"requests: {dict(self.answers)}", *self.faults, f"quiet after {self.quiet_after_s:.2f} s"]
        return "\n".join([*lines, f"RSS in MB/min: {slopes}", *(self.wrong or ["nothing wrong"])])


class Clients:
    """Threads that send random requests of the catalogue one after the other."""

    def __init__(self, up: Up, requests: list[Request], seed: int, report: Report) -> None:
        self._up, self._requests, self._report = up, requests, report
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        # When each client's running request began; it has met every fault since.
        self._began = [time.monotonic()] * NUM_CLIENTS
        self._threads = [
            threading.Thread(target=self._run, args=(number, random.Random(f"{seed}/{number}")))
            for number in range(NUM_CLIENTS)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, number: int, rng: random.Random) -> None:
        with httpx.Client(base_url=self._up.http, timeout=60) as client:
            while not self._stopping.is_set():
                request = rng.choice(self._requests)
                self._began[number] = time.monotonic()
                self._note(request, self._ending(client, request, rng))

    @staticmethod
    def _ending(client: httpx.Client, request: Request, rng: random.Random) -> str:
        try:
            return perform(client, request, rng)
        except (WrongAnswer, httpx.HTTPError) as error:
            return f"WRONG {type(error).__name__} {error}"

    def _note(self, request: Request, ending: str) -> None:
        with self._lock:
            if ending.startswith("WRONG"):
                self._report.wrong.append(f"request {request.number}: {ending}")
            else:
                self._report.answers[ending] += 1

    def all_began_after(self, moment_s: float) -> bool:
        """Whether no running request is older than that, on time.monotonic()."""
        return all(began > moment_s for began in self._began)

    def stop(self) -> None:
        """Let each finish its request."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(90)
        if any(thread.is_alive() for thread in self._threads):
            self._report.wrong.append("a request has no end")


MIN_SAMPLES = 20
"""Fewer samples, one a fault, show caches that fill."""


class Memory:
    """Resident memory of all processes over time."""

    def __init__(self, up: Up) -> None:
        self._root = psutil.Process(up.process.pid)
        self._samples: dict[tuple[int, str], list[tuple[float, float]]] = {}
        self._num_samples = 0

    def sample(self) -> None:
        """Take one sample of each process, (s, MB)."""
        self._num_samples += 1
        for process in self._root.children(recursive=True):
            try:
                words, megabytes = process.cmdline(), process.memory_info().rss / 1e6
            except psutil.Error:
                continue
            name = words[words.index("-m") + 1] if "-m" in words else words[0] if words else "?"
            self._samples.setdefault((process.pid, name), []).append((time.monotonic(), megabytes))

    def slopes(self) -> dict[str, float]:
        """MB per minute over the run's second half, least squares, of processes in all samples."""
        return {
            f"{name}[{pid}]": _slope(points[len(points) // 2 :])
            for (pid, name), points in self._samples.items()
            if len(points) == self._num_samples >= MIN_SAMPLES
        }


def _slope(points: list[tuple[float, float]]) -> float:
    """Per minute."""
    mean_t = sum(t for t, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((t - mean_t) ** 2 for t, _ in points)
    return 60 * sum((t - mean_t) * (y - mean_y) for t, y in points) / spread if spread else 0.0


def is_whole(up: Up) -> bool:
    """Whether all four workers are ready and their own pages answer."""
    try:
        ready = sum(worker["state"] == "ready" for worker in up.state()["workers"])
        return ready == 4 and len(up.workers()) == 4
    except httpx.HTTPError:
        # The gateway has not seen yet that one of them is gone.
        return False


class Faults:
    """Random faults, one after the other."""

    def __init__(self, up: Up, seed: int, report: Report) -> None:
        self._up, self._report = up, report
        self._rng = random.Random(f"{seed}/faults")
        self._start_s = time.monotonic()
        self._kills: dict[str, list[float]] = {}
        # Each kind early on, then in any order.
        self._deck: list[tuple[str, str]] = []

    def one(self) -> None:
        """Do the next one; it raises if it had no effect."""
        kind, role = self._draw()
        victim = choose_victim(self._up, role, self._rng)
        if kind == "kill" and self._in_a_crash_loop(victim.worker_id):
            kind = "long stall"
        FAULTS[kind](victim.pid)
        at = time.monotonic() - self._start_s
        self._report.faults.append(f"{at:6.1f} s: {kind} of {victim} with {victim.num_attempts} attempts")

    def _draw(self) -> tuple[str, str]:
        if not self._deck:
            self._deck = [(kind, role) for kind in FAULTS for role in ("prefill", "decode")]
            self._rng.shuffle(self._deck)
        return self._deck.pop()

    def _in_a_crash_loop(self, worker_id: str) -> bool:
        """Whether one kill more would be too many; counts it if not."""
        now = time.monotonic()
        recent = [at for at in self._kills.get(worker_id, []) if now - at < KILL_WINDOW_S]
        self._kills[worker_id] = recent
        if len(recent) >= MAX_KILLS_PER_WORKER:
            return True
        recent.append(now)
        return False


def soak(up: Up, *, seconds: float, seed: int) -> Report:
    """Disturb a fleet of two prefill and two decode workers for about so long."""
    report = Report()
    eventually(lambda: is_whole(up), WHOLE_AGAIN_S, "all workers")
    requests = catalogue(up, random.Random(f"{seed}/catalogue"), CATALOGUE_SIZE)
    memory, faults = Memory(up), Faults(up, seed, report)
    clients = Clients(up, requests, seed, report)
    end_s = time.monotonic() + seconds
    try:
        while time.monotonic() < end_s and not report.wrong:
            moment_s = time.monotonic()
            faults.one()
            eventually(lambda: is_whole(up), WHOLE_AGAIN_S, "all workers again")
            eventually(
                lambda since=moment_s: clients.all_began_after(since), 60, "requests that met the fault"
            )
            memory.sample()
    finally:
        clients.stop()
    eventually(lambda: is_whole(up), WHOLE_AGAIN_S, "all workers at the end")
    report.quiet_after_s = eventually(up.is_quiet, 5, "quiet")
    report.rss_slopes = memory.slopes()
    return report


def main() -> int:
    """The exit code: 0 if nothing was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1, help="of each worker")
    arguments = parser.parse_args()
    up = Up(
        "--prefill=2", "--decode=2", *(f"--{role}-tp={arguments.ranks}" for role in ("prefill", "decode"))
    )
    try:
        report = soak(up, seconds=arguments.seconds, seed=arguments.seed)
        print(report)
        if report.wrong:
            print(up.stderr[-20_000:])
        up.stop()
    finally:
        up.kill()
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
