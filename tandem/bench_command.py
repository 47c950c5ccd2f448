"""`tandem bench` between the command line and tandem.bench: which server, which file, what is printed."""

import asyncio
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from runtime.errors import InvalidRequest, StartupError
from tandem import bench
from tandem.bench import Sample, Workload
from tandem.bench_backends import GrpcBackend, HttpBackend, vocab_size
from tandem.bench_report import Report, parse_objectives, summarize
from tandem.client import Client
from tandem.credentials import http_headers


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where a benchmark goes."""

    backend: str
    """grpc or http."""
    address: str
    """host:port for grpc, a URL for http."""
    vocab_size: int | None = None
    """None: that of the served checkpoint."""
    json_file: str | None = None
    """Path of the report."""


def run(workload: Workload, options: Options, goodput: Sequence[str]) -> int:
    """Measure, print and write; exit code 1 if a request failed."""
    try:
        objectives = parse_objectives(goodput)
    except InvalidRequest as error:
        raise StartupError(error.message) from error
    if options.backend not in ("grpc", "http"):
        raise StartupError(f"--backend {options.backend}: expected grpc or http")
    if not workload.request_rate > 0:
        raise StartupError(f"--request-rate {workload.request_rate}: expected a rate over 0")
    model_id, samples, duration_s = asyncio.run(_measure(workload, options))
    report = summarize(samples, duration_s, objectives)
    _print(report)
    errors = sorted({sample.error for sample in samples if sample.error is not None})
    if options.json_file is not None:
        whole = _header(workload, options, model_id) | report | {"errors": errors}
        Path(options.json_file).write_text(json.dumps(whole, indent=2) + "\n")
    for line in errors:
        print(f"failed: {line}")  # noqa: T201 - the user's terminal is the place
    return 1 if errors else 0


async def _measure(workload: Workload, options: Options) -> tuple[str, list[Sample], float]:
    if options.backend == "grpc":
        async with Client(options.address) as client:
            return await _with(GrpcBackend(client), workload, options)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=options.address, headers=http_headers(), limits=limits, timeout=None, trust_env=False
    ) as http:
        return await _with(HttpBackend(http), workload, options)


async def _with(
    backend: GrpcBackend | HttpBackend, workload: Workload, options: Options
) -> tuple[str, list[Sample], float]:
    model = await backend.model()
    size = options.vocab_size or vocab_size(model)
    if size is None:
        raise StartupError(f"--vocab-size: cannot be read from {model.root or model.id} on this machine")
    workload = dataclasses.replace(workload, vocab_size=size)
    samples, duration_s = await bench.run(backend, workload)
    return model.id, samples, duration_s


def _header(workload: Workload, options: Options, model_id: str) -> dict[str, Any]:
    rate = workload.request_rate
    return {
        "date": datetime.now(UTC).strftime("%Y%m%d-%H%M%S"),
        "backend": options.backend,
        "model_id": model_id,
        "num_prompts": workload.num_prompts,
        "request_rate": "inf" if math.isinf(rate) else rate,
        "max_concurrency": workload.max_concurrency,
        "random_input_len": workload.input_len,
        "random_output_len": workload.output_len,
        "temperature": workload.temperature,
        "seed": workload.seed,
    }


def _print(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    names = ("ttft", "tpot", "itl", "e2el")
    kinds = ("mean", "std", "p50", "p90", "p95", "p99")
    latencies = Table("ms", *kinds)
    for name in names:
        latencies.add_row(name, *(f"{report[f'{kind}_{name}_ms']:.2f}" for kind in kinds))
    console = Console(highlight=False)
    console.print(_summary(report))
    console.print(latencies)


def _summary(report: Mapping[str, float | int | None]) -> str:
    goodput = report["request_goodput"]
    lines = [
        f"{report['completed']} completed, {report['failed']} failed in {report['duration']:.2f} s",
        f"{report['request_throughput']:.2f} requests/s"
        + ("" if goodput is None else f", {goodput:.2f} within the objectives"),
        f"{report['output_throughput']:.1f} output tokens/s, {report['total_token_throughput']:.1f} in all",
    ]
    return "\n".join(lines)
