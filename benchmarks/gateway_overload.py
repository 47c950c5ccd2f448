"""A gateway that is asked for more than it can do: `make bench-gateway` runs this, too.

The gateway has 64 slots and as many places in its queue; a request takes a second on the echo workers, so 64
requests a second is all there is. Goodput counts answers that are complete within GOOD_S. Generator and
workers share one core, the gateway has the other.
"""

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.gateway_load import Case, Stamps
from benchmarks.gateway_open_loop import GOOD_S, Arrivals
from benchmarks.gateway_processes import Gateways, await_workers, gateways, run_client, running

SLOTS, QUEUE = 64, 64
STEPS_PER_S, NUM_TOKENS = 25, 25
CAPACITY = SLOTS * STEPS_PER_S / NUM_TOKENS
"""Requests per second."""

SECONDS = 13.0
NUM_IDLE_HTTP, NUM_IDLE_GRPC, NUM_SLOW = 10_000, 1_000, 64
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
GOALS = {"goodput_2x": 0.9, "goodput_5x": 0.8, "refusal_p99_ms": 50.0}


@contextlib.contextmanager
def server(cores: Sequence[int], *flags: str, rate: float = STEPS_PER_S) -> Iterator[Gateways]:
    """A gateway and its echo workers."""
    with tempfile.TemporaryDirectory() as folder, gateways(1, cores, *flags) as found:
        stamps = Path(folder) / "stamps"
        Stamps.create(stamps)
        case = Case(face="http", num_streams=1, rate=rate)
        arguments = ("-m", "benchmarks.gateway_echo", found.internal, case.dump(), str(stamps))
        with running(cores[1:2], *arguments) as echo:
            found.workers, found.stamps = echo.pid, str(stamps)
            await_workers(found.http)
            yield found


def limited() -> tuple[str, str]:
    """Flags for the small gateway."""
    return f"--max-concurrent-requests={SLOTS}", f"--max-waiting-requests={QUEUE}"


def play(cores: Sequence[int], loads: Sequence[Arrivals]) -> list[dict[str, Any]]:
    """What became of each of the loads, played at once."""
    with contextlib.ExitStack() as stack:
        clients: list[subprocess.Popen[str]] = [
            stack.enter_context(
                running(cores[1:2], "-m", "benchmarks.gateway_open_loop", "load", json.dumps(vars(load)))
            )
            for load in loads
        ]
        return [json.loads(client.communicate(timeout=120)[0]) for client in clients]


def overload(cores: Sequence[int]) -> list[dict[str, Any]]:
    """Once, twice and five times what there is, on both faces."""
    rows = []
    for face in ("http", "grpc"):
        for times in (1, 2, 5):
            with server(cores, *limited()) as found:
                address = found.http if face == "http" else found.grpc
                load = Arrivals(
                    face=face,
                    address=address,
                    per_s=times * CAPACITY,
                    seconds=SECONDS,
                    num_tokens=NUM_TOKENS,
                )
                row = {"face": face, "times": times} | play(cores, [load])[0]
            print(row, flush=True)
            rows.append(row)
    return rows


def fairness(cores: Sequence[int]) -> dict[str, Any]:
    """A key that asks for four times what there is beside one that asks for a quarter."""
    with server(cores, *limited(), "--api-keys=greedy,modest") as found:
        loads = [
            Arrivals(
                face="http",
                address=found.http,
                per_s=per_s * CAPACITY,
                seconds=SECONDS,
                num_tokens=NUM_TOKENS,
                key=key,
            )
            for key, per_s in (("greedy", 4.0), ("modest", 0.25))
        ]
        greedy, modest = play(cores, loads)
    row = {"greedy": greedy, "modest": modest}
    print(row, flush=True)
    return row


def bystanders(cores: Sequence[int]) -> list[dict[str, Any]]:
    """256 streams alone, beside streams that nobody reads, and beside idle connections."""
    rows = []
    case = Case(face="http", num_streams=256, rate=10)
    for name in ("alone", f"{NUM_SLOW} streams nobody reads", f"{NUM_IDLE_HTTP:,} + {NUM_IDLE_GRPC:,} idle"):
        with (
            server(cores, "--max-concurrent-requests=4096", rate=case.rate) as found,
            contextlib.ExitStack() as stack,
        ):
            empty = psutil.Process(found.pids[0]).memory_info().rss
            for arguments in beside(name, found):
                process = stack.enter_context(
                    running(cores[1:2], "-m", "benchmarks.gateway_open_loop", *arguments)
                )
                assert process.stdout is not None
                assert process.stdout.readline() == "idle\n"
            seen = run_client(case, cores, found)
            grown = psutil.Process(found.pids[0]).memory_info().rss - empty
            row = {"beside": name, "grown_mib": grown / 2**20} | seen
        print(row, flush=True)
        rows.append(row)
    return rows


def beside(name: str, found: Gateways) -> list[tuple[str, ...]]:
    """Arguments of the processes that hold the other connections."""
    if "nobody" in name:
        return [("slow", found.http, str(NUM_SLOW))]
    if "idle" in name:
        return [
            ("idle", found.http, str(NUM_IDLE_HTTP), ""),
            ("idle", found.grpc, str(NUM_IDLE_GRPC), HTTP2_PREFACE.hex()),
        ]
    return []


def markdown(report: dict[str, Any]) -> list[str]:
    """Tables."""
    lines = [
        "",
        "## More than it can do",
        "",
        f"{SLOTS} slots, {QUEUE} places in the queue; a request takes a second, so {CAPACITY:.0f} a second",
        f"are all. Good: complete within {GOOD_S:.0f} s. Refusals carry a retry hint; their time is the",
        "client's and holds a connection's setup over HTTP. Lost: neither answered nor refused.",
        "",
        "| face | offered | requests/s | good/s | of its peak | late/s | refused/s | refusal p50 ms | p99 ms"
        " | lost |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report.get("overload", []):
        peak = max(each["goodput_per_s"] for each in report["overload"] if each["face"] == row["face"])
        share = row["goodput_per_s"] / peak
        lines.append(
            f"| {row['face']} | {row['times']}× | {row['offered_per_s']:.0f} | {row['goodput_per_s']:.1f}"
            f" | {share:.0%} | {row['late_per_s']:.1f} | {row['refused_per_s']:.0f}"
            f" | {_ms(row['refusal_p50_ms'])} | {_ms(row['refusal_p99_ms'])} | {row['lost']} |"
        )
    lines += ["", "## Two API keys", "", "| key | requests/s | good/s | refused/s |", "|---|---|---|---|"]
    for key, row in report.get("fairness", {}).items():
        lines.append(
            f"| {key} | {row['offered_per_s']:.0f} | {row['goodput_per_s']:.1f}"
            f" | {row['refused_per_s']:.1f} |"
        )
    lines += [
        "",
        "## Beside others",
        "",
        "256 streams over HTTP with 10 tokens a second each.",
        "",
        "| beside | delay p50 ms | p99 ms | gateway µs/token | gateway grew by MiB |",
        "|---|---|---|---|---|",
    ]
    for row in report.get("bystanders", []):
        delay = row["delay_ms"]
        lines.append(
            f"| {row['beside']} | {delay['p50']:.1f} | {delay['p99']:.1f} | {row['gateway_us_per_token']:.1f}"
            f" | {row['grown_mib']:.0f} |"
        )
    return lines


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
