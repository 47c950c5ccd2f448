"""Everything that is measured on a GPU, in one run: `make bench-gpu`.

Each section of rows is a process of its own, so that what one row breaks is broken for that row alone.
Results are written after every section: a run that is cut off leaves what it has. Without a GPU,
`--device cpu --rehearse` goes through all rows at tiny sizes and writes nothing.
"""

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu_rows.catalogue import SECTIONS, catalogue
from benchmarks.gpu_rows.clocks import Clocks
from benchmarks.gpu_rows.conductor import Conductor
from benchmarks.gpu_rows.report import markdown, row_markdown, unmeasured
from benchmarks.gpu_rows.row import Row
from benchmarks.gpu_rows.spawn import spawn
from benchmarks.machine import machine, output_of

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    """Exit code 2: there is nothing to measure on."""
    options = parser().parse_args()
    rows = [row for row in catalogue() if not options.only or row.section in options.only]
    if options.list:
        print(unmeasured(rows), end="")
        return 0
    problem = unusable(options)
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    report = measure(rows, options)
    print(markdown(report))
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    known = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    known.add_argument("--budget-s", type=float, default=450.0, help="seconds that all of it may take")
    known.add_argument("--only", nargs="+", choices=SECTIONS, default=[], help="sections; all if not given")
    known.add_argument("--list", action="store_true", help="print rows and goals, measure nothing")
    known.add_argument("--out", type=Path, help="folder for gpu.json and gpu.md")
    known.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    known.add_argument("--rehearse", "--tiny", action="store_true", help="tiny sizes; writes to --out alone")
    return known


def unusable(options: argparse.Namespace) -> str | None:
    """Why this machine cannot do it."""
    if options.device == "cpu":
        return None if options.rehearse else "a CPU is for a rehearsal alone: --device cpu --rehearse"
    import torch

    if torch.cuda.is_available():
        return None
    return (
        f"make bench-gpu needs an NVIDIA GPU, and torch {torch.__version__} of {sys.executable} sees none; "
        'ARGS="--device cpu --rehearse" goes through all rows without one'
    )


def measure(rows: list[Row], options: argparse.Namespace) -> dict[str, Any]:
    """All sections; the report is written behind each."""
    start_s = time.monotonic()
    device = "cuda:0" if options.device == "cuda" else "cpu"
    conductor = Conductor(
        rows, device=device, rehearsal=options.rehearse, budget_s=options.budget_s, spawn=spawn
    )
    report: dict[str, Any] = {
        "machine": machine(),
        "rehearsal": options.rehearse,
        "budget_s": options.budget_s,
        "facts": {"driver": driver()},
        "clocks": {},
        "rows": [],
    }
    with contextlib.closing(Clocks()) as clocks:
        for section in conductor.sections():
            for row in conductor.run(section):
                report["rows"].append(row)
                print(row_markdown(row), file=sys.stderr, flush=True)
            report["clocks"][section] = clocks.take()
            report["facts"] |= conductor.facts
            report["seconds"] = time.monotonic() - start_s
            write(report, options)
    return report


def driver() -> str:
    """Of the first GPU."""
    return output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")


def write(report: dict[str, Any], options: argparse.Namespace) -> None:
    """To --out; without it a whole run on a GPU goes to results/."""
    folder = options.out
    if folder is None and not options.only and not options.rehearse:
        folder = RESULTS
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
        (folder / "gpu.md").write_text(markdown(report))


if __name__ == "__main__":
    sys.exit(main())
