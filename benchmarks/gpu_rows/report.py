"""The report of `make bench-gpu` as a Markdown table."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from benchmarks.gpu_rows.row import Row, result

REHEARSAL = "**Rehearsal**: tiny sizes on a CPU. No number here means anything."
NO_GPU = "Nothing is measured yet: `make bench-gpu` on a GPU overwrites this page. No row is estimated."
METHOD = """\
Floors are made of this run's own read bandwidth, copy bandwidth and matrix product; a ratio is measured ÷
what stands beside it. Weights are random, decoding is greedy, contexts are 1k unless named. A step is
`Engine.step` by the wall until its tokens are on the host. Operators are replayed from a CUDA graph over
inputs that together exceed the L2 cache."""
HEADER = """\
| row | measured | beside | | ratio | goal | |
|---|---|---|---|---|---|---|"""
MAX_ERROR_LENGTH = 160


def markdown(report: dict[str, Any]) -> str:
    """The whole page."""
    lines = ["# On a GPU", "", *_preamble(report), "", HEADER, *map(row_markdown, report["rows"]), ""]
    lines += _versions(report)
    return "\n".join(lines) + "\n"


def unmeasured(rows: Sequence[Row]) -> str:
    """The page before anything is measured: rows and goals."""
    results = [result(row, None, "no GPU was at hand") for row in rows]
    lines = ["# On a GPU", "", NO_GPU, "", HEADER, *map(row_markdown, results)]
    return "\n".join(lines) + "\n"


def _preamble(report: dict[str, Any]) -> list[str]:
    facts, machine = report["facts"], report["machine"]
    verdicts = Counter(row["verdict"] for row in report["rows"])
    said = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common())
    return [
        *([REHEARSAL, ""] if report["rehearsal"] else []),
        f"{facts.get('gpu', machine['cpu'])}, {machine['date']}, commit {machine['commit'] or 'unknown'},",
        f"{report['seconds']:.0f} s of {report['budget_s']:.0f} s. Rows: {said}.",
        "",
        METHOD,
    ]


def row_markdown(row: dict[str, Any]) -> str:
    """One line of the table."""
    goal = row["goal"] or ""
    if row["measured"] is None:
        error = (row["error"] or "").replace("|", "\\|")[:MAX_ERROR_LENGTH]
        return f"| {row['name']} | unmeasured: {error} | | | | {goal} | unmeasured |"
    beside = "" if row["floor"] is None else number(row["floor"])
    against = row["against"] if row["floor"] is not None else ""
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}×"
    verdict = row["verdict"] if row["verdict"] in ("met", "missed") else ""
    note = f" ({row['note']})" if row["note"] else ""
    return (
        f"| {row['name']}{note} | {number(row['measured'])} {row['unit']} | {beside} | {against} | {ratio} "
        f"| {goal} | {verdict} |"
    )


def number(value: float) -> str:
    """Three digits that count, or all before the point."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _versions(report: dict[str, Any]) -> list[str]:
    names = ("driver", "cuda", "torch", "triton", "transformers", "flashinfer-python", "python")
    facts = report["facts"]
    versions = ", ".join(f"{name} {facts[name]}" for name in names if facts.get(name)) + "."
    clocks = [f"* {section}: {text}" for section, text in report["clocks"].items() if text]
    return [versions, *(["", "Medians while the GPU worked:", "", *clocks] if clocks else [])]
