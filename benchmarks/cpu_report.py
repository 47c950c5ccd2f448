"""From rounds to the numbers and the table of `make bench-cpu`."""

import statistics
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.cpu import Measured

TRANSFORMERS = "transformers"
OPENVINO = "openvino-genai"


def summary(measured: "Measured") -> dict[str, Any]:
    """Medians over the rounds; gaps between tokens pooled."""
    whole: dict[str, Any] = {
        "name": measured.name,
        "max_num_batched_tokens": measured.max_num_batched_tokens,
        "versions": measured.versions,
        "error": measured.error,
    }
    if not measured.rounds:
        return whole
    cpu_s = [each.cpu_s for each in measured.rounds]
    gaps = sorted(gap for each in measured.rounds for gap in each.itl_s)
    num_tokens = sum(map(len, measured.rounds[0].outputs))
    return whole | {
        "cpu_s": cpu_s,
        "wall_s": [each.wall_s for each in measured.rounds],
        "output_tokens_per_cpu_s": num_tokens / statistics.median(cpu_s),
        "output_tokens_per_s": num_tokens / statistics.median(each.wall_s for each in measured.rounds),
        "p50_itl_ms": 1e3 * quantile(gaps, 0.5),
        "p99_itl_ms": 1e3 * quantile(gaps, 0.99),
        "p99_ttft_ms": 1e3 * quantile(sorted(t for each in measured.rounds for t in each.ttft_s), 0.99),
        "outputs": measured.rounds[-1].outputs,
    }


def quantile(ordered: list[float], q: float) -> float:
    """Of sorted values, the nearest one below."""
    return ordered[min(int(len(ordered) * q), len(ordered) - 1)]


def compare(runs: list[dict[str, Any]]) -> None:
    """Add each arm's ratios to the peers of its run, the best of a peer's settings, and drop the tokens."""
    for run in runs:
        ran = [arm for arm in run["arms"] if arm["error"] is None]
        reference = next((arm["outputs"] for arm in ran if arm["name"] == TRANSFORMERS), None)
        for arm in ran:
            for peer in (TRANSFORMERS, OPENVINO):
                rivals = [other for other in ran if other["name"].split(",")[0] == peer]
                if rivals:
                    arm[f"times_{peer}"] = _ratios(arm, rivals)
            if reference is not None:
                same = sum(a == b for a, b in zip(arm["outputs"], reference, strict=True))
                arm["outputs_like_transformers"] = same / len(reference)
        for arm in ran:
            del arm["outputs"]


def _ratios(arm: dict[str, Any], rivals: list[dict[str, Any]]) -> dict[str, float]:
    best = {
        name: max(rival[name] for rival in rivals)
        for name in ("output_tokens_per_cpu_s", "output_tokens_per_s")
    }
    least_itl = min(rival["p99_itl_ms"] for rival in rivals)
    return {name: arm[name] / value for name, value in best.items()} | {
        "p99_itl_ms": arm["p99_itl_ms"] / least_itl
    }


PREAMBLE = """\
{cpu}, {cpus} cores, {date}, commit {commit}, load average {load_average_at_start:.1f} at the start and
{load_average_at_end:.1f} at the end: where that exceeds the cores, only CPU time means much.
32 requests at once, prompts of 32 to 512 tokens, 16 to 64 output tokens, a random Llama of 27M parameters.
Medians of the rounds; each ratio is to the best of the peer's settings in that column (tf: transformers,
ov: openvino-genai). In brackets: most tokens in a step. An arm with N threads is pinned to N cores;
`tandem up` has one thread in each of its two workers."""

HEADER = """\
| threads | arm | tokens/CPU-s | ÷ tf | ÷ ov | tokens/s | ÷ tf | ÷ ov | p99 ITL ms | ÷ ov | same as tf |
|---|---|---|---|---|---|---|---|---|---|---|
"""

COLUMNS = (
    ("output_tokens_per_cpu_s", 0, (TRANSFORMERS, OPENVINO)),
    ("output_tokens_per_s", 0, (TRANSFORMERS, OPENVINO)),
    ("p99_itl_ms", 0, (OPENVINO,)),
)
"""What is shown, with how many decimals, beside which peers."""


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = ["# Mixed load on a CPU", "", PREAMBLE.format(**report), ""]
    for dtype in ("float32", "bfloat16"):
        runs = [run for run in report["runs"] if run["dtype"] == dtype]
        lines += [f"## {dtype}", ""]
        if runs:
            rows = [_row(run["threads"], arm) for run in runs for arm in run["arms"]]
            lines += [HEADER + "\n".join(rows), ""]
        else:
            lines += ["Did not run: this processor has no bfloat16 instructions.", ""]
    versions = {
        name: v for run in report["runs"] for arm in run["arms"] for name, v in arm["versions"].items()
    }
    lines.append(", ".join(f"{name} {version}" for name, version in sorted(versions.items())) + ".")
    return "\n".join(lines) + "\n"


def _row(threads: int, arm: dict[str, Any]) -> str:
    name = f"{arm['name']} ({arm['max_num_batched_tokens']})"
    if arm["error"] is not None:
        return f"| {threads} | {name} | did not run: {arm['error']} |{' |' * 8}"
    cells = [str(threads), name]
    for quantity, digits, peers in COLUMNS:
        cells.append(f"{arm[quantity]:.{digits}f}")
        cells += [_ratio(arm, peer, quantity) for peer in peers]
    same = arm.get("outputs_like_transformers")
    cells.append("–" if same is None else f"{same:.0%}")
    return f"| {' | '.join(cells)} |"


def _ratio(arm: dict[str, Any], peer: str, quantity: str) -> str:
    ratios = arm.get(f"times_{peer}")
    return f"{ratios[quantity]:.2f}" if ratios else "–"
