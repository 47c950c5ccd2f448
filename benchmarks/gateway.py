"""The gateway under many streams and under more than it can do: `make bench-gateway`.

The gateway is pinned to one core; echo workers and client, a process each, share another one. Each case
starts anew. Delay is from the moment a token leaves its worker to the moment the client has read it, so
it holds the generator's own delays too: where the generator's core is full, the delays are its own. CPU time
per token is the gateway process's alone and does not depend on that.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import gateway_overload
from benchmarks.gateway_load import Case
from benchmarks.gateway_processes import run_case
from benchmarks.machine import machine

RESULTS = Path(__file__).parent / "results"
SATURATED = 0.9
"""Of the generator's core in use: from here on it is the generator that is measured."""

GOALS = {"tokens_per_s": 20_000, "p99_ms": 10.0, "gateway_us_per_token": 45.0}

CASES = [
    Case(face="grpc", num_streams=32, rate=40),
    Case(face="grpc", num_streams=256, rate=10),
    Case(face="grpc", num_streams=1024, rate=4),
    Case(face="grpc", num_streams=2048, rate=2),
    Case(face="grpc", num_streams=2048, rate=4),
    Case(face="grpc", num_streams=2048, rate=10),
    Case(face="http", num_streams=32, rate=40),
    Case(face="http", num_streams=256, rate=10),
    Case(face="http", num_streams=1024, rate=4),
    Case(face="http", num_streams=2048, rate=2),
    Case(face="http", num_streams=2048, rate=8),
    Case(face="http", num_streams=2048, rate=10),
    Case(face="http", num_streams=2048, rate=4, processes=2),
    Case(face="grpc", num_streams=2048, rate=2, processes=2),
]


def is_saturated(row: dict[str, Any]) -> bool:
    """Whether the generator had no core to spare."""
    cores: dict[str, float] = row["cores"]
    return cores["workers"] + cores["client"] > SATURATED


def markdown(report: dict[str, Any]) -> str:
    """All tables."""
    lines = [
        "# The gateway under load",
        "",
        f"{report['machine']['cpu']}, two cores: the gateway has one, 16 echo workers and the client share",
        "the other. Delay: worker to client, generator included; † its core was full, so that rate and delay",
        "are the generator's; where that is follows from its time per token. CPU: the gateway's per token.",
        "Two gateway processes have a core each, one of them together with the generator.",
        "",
        f"Goals: {GOALS['tokens_per_s']:,} tokens/s, p99 {GOALS['p99_ms']:.0f} ms,"
        f" {GOALS['gateway_us_per_token']:.0f} µs.",
        "",
        "| face | processes | streams | offered tokens/s | tokens/s | delay p50 ms | p99 ms"
        " | gateway µs/token | core | generator full at tokens/s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += map(row_markdown, report.get("http", []) + report.get("grpc", []))
    return "\n".join([*lines, *gateway_overload.markdown(report)]) + "\n"


def row_markdown(row: dict[str, Any]) -> str:
    """One case."""
    start = f"| {row['face']} | {row['processes']} | {row['num_streams']:,} | {row['offered']:,.0f} |"
    if "failed" in row:
        return f"{start} not held: {row['failed']} | | | | | |"
    cores, delay = row["cores"], row["delay_ms"]
    mark = " †" if is_saturated(row) else ""
    full_at = row["tokens_per_s"] / (cores["workers"] + cores["client"])
    cells = [
        f"{row['tokens_per_s']:,.0f}{mark}",
        f"{delay['p50']:.1f}{mark}",
        f"{delay['p99']:.1f}{mark}",
        f"{row['gateway_us_per_token']:.1f}",
        f"{cores['gateway']:.0%}",
        f"{full_at:,.0f}",
    ]
    return f"{start} {' | '.join(cells)} |"


def load(cores: Sequence[int], only: str = "") -> list[dict[str, Any]]:
    """The cases whose name, for example http-2048-10-1, contains the text."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            if only in f"{case.face}-{case.num_streams}-{case.rate:.0f}-{case.processes}":
                rows.append(run_case(case, cores, Path(folder) / "stamps"))
                print(row_markdown(rows[-1]), flush=True)
    return rows


PARTS: dict[str, Callable[[Sequence[int]], Any]] = {
    "http": lambda cores: load(cores, "http"),
    "grpc": lambda cores: load(cores, "grpc"),
    "overload": gateway_overload.overload,
    "fairness": gateway_overload.fairness,
    "bystanders": gateway_overload.bystanders,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gateway", description=__doc__)
    parser.add_argument(
        "--only", help="cases of which FACE-STREAMS-RATE-PROCESSES has this; writes no results"
    )
    parser.add_argument("--part", choices=PARTS, action="append", help="others' results stay; default: all")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("two cores are needed: one for the gateway, one for workers and client")
    if options.only:
        load(cores, options.only)
        return
    file = RESULTS / "gateway.json"
    report = json.loads(file.read_text()) if options.part and file.exists() else {}
    report |= {"machine": machine(), "goals": GOALS | gateway_overload.GOALS}
    report |= {name: PARTS[name](cores) for name in options.part or PARTS}
    file.write_text(json.dumps(report, indent=1) + "\n")
    (RESULTS / "gateway.md").write_text(markdown(report))


if __name__ == "__main__":
    main()
