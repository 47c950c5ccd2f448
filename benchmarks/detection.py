"""How long it takes until a gateway knows that a worker is gone, hangs or cannot be reached.

`make bench-detection` writes results/detection.json and detection.md. Each sample disturbs one worker of a
fleet of real processes, and ends when the gateway's /debug/state calls that worker down.
"""

import argparse
import itertools
import json
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.harness import eventually
from tests.faults.faults import kill, process_state
from tests.faults.fleet import Fleet
from tests.faults.proxy import DOWN, UP

RESULTS = Path(__file__).parent / "results"
PROMPT = list(range(3, 203))
NUM_STREAMS = 4
STALL_S = 1.5
WARM_STEPS = 20
"""What is to be expected of a step is not known before."""
PROMISED = {
    "death": "0.25",
    "hang": "2",
    "blackhole": "2",
    "step that hangs": "2, or 10 times its prediction",
}
"""In seconds."""

Sample = Callable[[Fleet, str], float]


class Load:
    """One stream after the other, so that workers are busy; every answer must be the first one."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._stopping = threading.Event()
        self._salts = itertools.count()
        self.want = self._ask()
        self.wrong: list[str] = []
        self._began = [0.0] * NUM_STREAMS
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(NUM_STREAMS)]
        for thread in self._threads:
            thread.start()

    def _ask(self) -> Any:
        # Nothing of it is cached anywhere, so that prefill workers have something to do.
        body = {"prompt": PROMPT, "max_tokens": 60, "temperature": 0, "ignore_eos": True}
        body["cache_salt"] = str(next(self._salts))
        with httpx.Client(timeout=60) as client:
            url = f"{self._fleet.urls['gateway-0']}/v1/completions"
            answer = client.post(url, json=body | {"return_token_ids": True})
        return answer.json()["choices"][0]["token_ids"] if answer.status_code == 200 else answer.text

    def _run(self, number: int) -> None:
        while not self._stopping.is_set():
            self._began[number] = time.monotonic()
            try:
                got = self._ask()
            except httpx.HTTPError as error:
                got = repr(error)
            if got != self.want:
                self.wrong.append(str(got)[:200])

    def renew(self) -> None:
        """Until every stream has begun after this call: none meets two faults."""
        moment_s = time.monotonic()
        eventually(lambda: min(self._began) > moment_s, 60, "new streams")

    def stop(self) -> None:
        """Let the last streams end."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(60)


def death(fleet: Fleet, name: str) -> float:
    """kill -9 until down; then another process takes the place."""
    start_s = time.monotonic()
    kill(fleet.members[name].pid)
    took_s = fleet.seconds_until_down(name, start_s)
    fleet.restart(name)
    return took_s


def hang(fleet: Fleet, name: str) -> float:
    """SIGSTOP until down."""
    pid = fleet.members[name].pid
    start_s = time.monotonic()
    os.kill(pid, signal.SIGSTOP)
    try:
        took_s = fleet.seconds_until_down(name, start_s)
        state = process_state(pid)
        assert state == "T", f"{name} did not stay stopped"
        return took_s
    finally:
        os.kill(pid, signal.SIGCONT)


def blackhole(fleet: Fleet, name: str) -> float:
    """Nothing comes through in either direction, until down."""
    start_s = time.monotonic()
    proxies = fleet.members[name].proxies
    for proxy in proxies:
        proxy.set(blackhole=(UP, DOWN))
    try:
        return fleet.seconds_until_down(name, start_s)
    finally:
        for proxy in proxies:
            proxy.set()


def stuck_step(fleet: Fleet, name: str) -> float:
    """The engine thread of any worker of this role stands still; its event loop goes on."""
    role = name.split("-")[0]
    eventually(lambda: any(_steps(fleet, f"{role}-{n}") >= WARM_STEPS for n in (0, 1)), 60, "some steps")
    point = f"{role}.step"
    fleet.points.arm(point, "hang")
    pid = fleet.points.wait_hit(point, 60)
    start_s = time.monotonic()
    stuck = next(member.name for member in fleet.members.values() if member.pid == pid)
    try:
        return fleet.seconds_until_down(stuck, start_s)
    finally:
        fleet.points.release(point)


SAMPLES: dict[str, Sample] = {
    "hang": hang,
    "blackhole": blackhole,
    "step that hangs": stuck_step,
    "death": death,
}


def _steps(fleet: Fleet, name: str) -> int:
    return int(fleet.worker(name)["steps"])


def stall(fleet: Fleet, name: str) -> int:
    """SIGSTOP for STALL_S; how many attempts beyond the first of each request that cost."""
    before = _retries(fleet)
    pid = fleet.members[name].pid
    os.kill(pid, signal.SIGSTOP)
    time.sleep(STALL_S)
    state = process_state(pid)
    os.kill(pid, signal.SIGCONT)
    assert state == "T", f"{name} did not stay stopped"
    time.sleep(1.0)  # what a stall has broken shows by then
    return _retries(fleet) - before


def _retries(fleet: Fleet) -> int:
    text = fleet.client.get(f"{fleet.urls['gateway-0']}/metrics").text
    lines = [line for line in text.splitlines() if line.startswith("tandem_request_retries_total")]
    return int(sum(float(line.rsplit(" ", 1)[1]) for line in lines))


def measure(num_samples: int) -> dict[str, Any]:
    """All kinds, prefill and decode workers in turn."""
    found: dict[str, Any] = {kind: [] for kind in SAMPLES}
    with Fleet() as fleet:
        load = Load(fleet)
        for kind, sample in SAMPLES.items():
            for number in range(num_samples):
                role = ("prefill", "decode")[number % 2]
                found[kind].append(sample(fleet, f"{role}-{number // 2 % 2}"))
                eventually(fleet.is_whole, 60, "all workers again")
                load.renew()
        names = [f"{role}-{number}" for role in ("prefill", "decode") for number in range(2)]
        found["stall"] = [stall(fleet, name) for name in names]
        load.renew()
        load.stop()
        found["wrong"] = load.wrong
        eventually(lambda: not fleet.held(), 5, "quiet")
    return found


def table(found: dict[str, Any]) -> str:
    """What was measured, for people."""
    lines = [
        "# Detection",
        "",
        "From the fault until the gateway calls the worker down, in seconds, under four streams at a time;",
        f"{os.cpu_count()} CPUs for two prefill workers, two decode workers, the gateway and the clients.",
        "",
        "| fault | samples | median | longest | promised |",
        "|---|---|---|---|---|",
    ]
    for kind, promised in PROMISED.items():
        seconds = found[kind]
        middle, longest = statistics.median(seconds), max(seconds)
        lines.append(f"| {kind} | {len(seconds)} | {middle:.2f} | {longest:.2f} | {promised} |")
    lines += [
        "",
        f"A stall of {STALL_S} s, {len(found['stall'])} workers in turn: attempts that were aborted: "
        f"{sum(found['stall'])} (promised: 0).",
        f"Wrong or failed answers in all of this: {len(found['wrong'])} (promised: 0).",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """The exit code: 0 unless an answer was wrong or a stall aborted something."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=8, help="of each kind")
    found = measure(parser.parse_args().samples)
    (RESULTS / "detection.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "detection.md").write_text(table(found))
    print(table(found))
    return 1 if found["wrong"] or sum(found["stall"]) else 0


if __name__ == "__main__":
    raise SystemExit(main())
