"""One gateway process under many streams: `make bench-gateway`.

The gateway is pinned to one core; echo workers and client, a process each, share another one. Each case
starts anew. Delay is from the moment a token leaves its worker to the moment the client has read it, so
it holds the generator's own delays too: where the generator's core is full, the delays are its own. CPU time
per token is the gateway process's alone and does not depend on that.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gateway_load import Case, Stamps
from benchmarks.machine import machine

RESULTS = Path(__file__).parent / "results"
READY = re.compile(r"listening http=http://(\S+) grpc=(\S+) internal=(\S+)")
READY_TIMEOUT_S = 30.0
CASE_TIMEOUT_S = 120.0
SATURATED = 0.9
"""Of the generator's core in use: from here on it is the generator that is measured."""

GOALS = {"tokens_per_s": 20_000, "p99_ms": 10.0, "gateway_us_per_token": 45.0}

CASES = [
    Case(face="grpc", num_streams=32, rate=40),
    Case(face="grpc", num_streams=256, rate=10),
    Case(face="grpc", num_streams=1024, rate=4),
    Case(face="grpc", num_streams=2048, rate=2),
    Case(face="grpc", num_streams=2048, rate=10),
    Case(face="http", num_streams=32, rate=40),
    Case(face="http", num_streams=256, rate=10),
    Case(face="http", num_streams=1024, rate=4),
    Case(face="http", num_streams=2048, rate=2),
    Case(face="http", num_streams=2048, rate=10),
]


def spawn(core: int, *arguments: str) -> subprocess.Popen[str]:
    """A Python process of ours on one core."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )


@contextlib.contextmanager
def running(core: int, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """One that is ended behind the context."""
    process = spawn(core, *arguments)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def run_case(case: Case, cores: Sequence[int], stamps: Path) -> dict[str, Any]:
    """A fresh gateway and fresh workers under one load."""
    flags = ["--http-port=0", "--grpc-port=0", "--max-concurrent-requests=4096", "--log-level=warning"]
    Stamps.create(stamps)
    with running(cores[0], "-m", "gateway", *flags) as gateway:
        assert gateway.stdout is not None
        ready = READY.match(gateway.stdout.readline())
        assert ready, "the gateway did not start"
        http, grpc, internal = ready.groups()
        with running(cores[1], "-m", "benchmarks.gateway_echo", internal, case.dump(), str(stamps)) as echo:
            pids = json.dumps({"gateway": gateway.pid, "workers": echo.pid})
            await_workers(http)
            address = http if case.face == "http" else grpc
            arguments = ("-m", "benchmarks.gateway_client", case.dump(), address, str(stamps), pids)
            with running(cores[1], *arguments) as client:
                output, _ = client.communicate(timeout=CASE_TIMEOUT_S)
    return asdict(case) | {"offered": case.offered} | json.loads(output)


def await_workers(http: str) -> None:
    """Until all workers are ready."""
    import httpx

    from benchmarks.gateway_echo import NUM_WORKERS

    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline_s:
        workers = httpx.get(f"http://{http}/debug/state", trust_env=False).json()["workers"]
        if sum(worker["state"] == "ready" for worker in workers) == NUM_WORKERS:
            return
        time.sleep(0.1)
    raise SystemExit("the echo workers did not become ready")


def is_saturated(row: dict[str, Any]) -> bool:
    """Whether the generator had no core to spare."""
    cores: dict[str, float] = row["cores"]
    return cores["workers"] + cores["client"] > SATURATED


def markdown(report: dict[str, Any]) -> str:
    """The table."""
    machine = report["machine"]
    lines = [
        "# One gateway process",
        "",
        f"{machine['cpu']}, {machine['date']}, commit {machine['commit']}, load average",
        f"{report['load'][0]:.1f} at the start and {report['load'][1]:.1f} at the end.",
        "The gateway has a core; 16 echo workers and the client share another one.",
        "Delay: worker to client, generator included; † its core was full, so that rate and delay are the",
        "generator's. CPU: the gateway's own per token.",
        "",
        f"Goals: {GOALS['tokens_per_s']:,} tokens/s, p99 {GOALS['p99_ms']:.0f} ms,"
        f" {GOALS['gateway_us_per_token']:.0f} µs.",
        "",
        "| face | streams | offered tokens/s | tokens/s | delay p50 ms | p99 ms | gateway µs/token | core |"
        " generator's core |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join(lines + [row_markdown(row) for row in report["rows"]]) + "\n"


def row_markdown(row: dict[str, Any]) -> str:
    """One case."""
    if "failed" in row:
        return (
            f"| {row['face']} | {row['num_streams']:,} | {row['offered']:,.0f} | not held: {row['failed']}"
            " | | | | | |"
        )
    cores, delay = row["cores"], row["delay_ms"]
    mark = " †" if is_saturated(row) else ""
    cells = [
        row["face"],
        f"{row['num_streams']:,}",
        f"{row['offered']:,.0f}",
        f"{row['tokens_per_s']:,.0f}{mark}",
        f"{delay['p50']:.1f}{mark}",
        f"{delay['p99']:.1f}{mark}",
        f"{row['gateway_us_per_token']:.1f}",
        f"{cores['gateway']:.0%}",
        f"{cores['workers'] + cores['client']:.0%}",
    ]
    return f"| {' | '.join(cells)} |"


def selected(only: str | None) -> list[Case]:
    """Cases whose name, for example grpc-256-10, contains the text."""
    return [case for case in CASES if not only or only in f"{case.face}-{case.num_streams}-{case.rate:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gateway", description=__doc__)
    parser.add_argument("--only", help="cases whose FACE-STREAMS-RATE contains this; writes no results")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("two cores are needed: one for the gateway, one for workers and client")
    report = {
        "machine": machine(),
        "goals": GOALS,
        "load": [os.getloadavg()[0]],
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        for case in selected(options.only):
            row = run_case(case, cores, Path(folder) / "stamps")
            report["rows"].append(row)
            print(row_markdown(row), flush=True)
    report["load"].append(os.getloadavg()[0])
    if not options.only:
        (RESULTS / "gateway.json").write_text(json.dumps(report, indent=1) + "\n")
        (RESULTS / "gateway.md").write_text(markdown(report))


if __name__ == "__main__":
    main()
