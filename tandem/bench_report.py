"""Numbers of a benchmark, under the field names of `vllm bench serve`."""

from collections.abc import Mapping, Sequence

import numpy as np

from runtime.errors import InvalidRequest
from tandem.bench import Sample

PERCENTILES = (50, 90, 95, 99)

OBJECTIVES = ("ttft", "tpot", "e2el")

Report = dict[str, float | int | None]


def parse_objectives(words: Sequence[str]) -> dict[str, float]:
    """`ttft:500 tpot:50` in milliseconds, one or several to a word; InvalidRequest for anything else."""
    objectives: dict[str, float] = {}
    for word in " ".join(words).split():
        name, _, limit = word.partition(":")
        try:
            objectives[name] = float(limit)
        except ValueError:
            name = ""
        if name not in OBJECTIVES:
            raise InvalidRequest(f"--goodput {word}: expected ttft:MS, tpot:MS or e2el:MS", field="goodput")
    return objectives


def summarize(samples: Sequence[Sample], duration_s: float, objectives: Mapping[str, float]) -> Report:
    """All numbers of a run; times in milliseconds, rates per second, goodput None without objectives."""
    done = [sample for sample in samples if sample.error is None]
    num_input = sum(sample.input_tokens for sample in done)
    num_output = sum(sample.output_tokens for sample in done)
    good = sum(meets(sample, objectives) for sample in done) / duration_s if objectives else None
    report: Report = {
        "duration": duration_s,
        "completed": len(done),
        "failed": len(samples) - len(done),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(done) / duration_s,
        "request_goodput": good,
        "output_throughput": num_output / duration_s,
        "total_token_throughput": (num_input + num_output) / duration_s,
    }
    report |= _distribution("ttft", [sample.ttft_s for sample in done])
    report |= _distribution("tpot", [sample.tpot_s for sample in done if sample.tpot_s is not None])
    report |= _distribution("itl", [gap for sample in done for gap in sample.itls_s])
    report |= _distribution("e2el", [sample.e2el_s for sample in done])
    return report


def meets(sample: Sample, objectives: Mapping[str, float]) -> bool:
    """Whether a request meets every objective, given in milliseconds; one token alone has a TPOT of 0."""
    measured = {"ttft": sample.ttft_s, "tpot": sample.tpot_s or 0.0, "e2el": sample.e2el_s}
    return all(measured[name] * 1000 <= limit for name, limit in objectives.items())


def _distribution(name: str, seconds: Sequence[float]) -> Report:
    values = np.array(seconds if len(seconds) else [0.0]) * 1000
    report: Report = {
        f"mean_{name}_ms": float(values.mean()),
        f"median_{name}_ms": float(np.median(values)),
        f"std_{name}_ms": float(values.std()),
    }
    return report | {f"p{p}_{name}_ms": float(np.percentile(values, p)) for p in PERCENTILES}
