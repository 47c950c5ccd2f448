"""`make bench-gpu` rehearsed: every row that is promised, at tiny sizes, without a GPU."""

import json
import subprocess
import sys

import pytest

from benchmarks import gpu
from benchmarks.gpu_rows import child, sampler
from benchmarks.gpu_rows.catalogue import catalogue
from benchmarks.gpu_rows.spawn import ChildDied

SHAPES = ("8B", "1B", "0.6B")
PROMISED = [
    "read bandwidth",
    "copy bandwidth",
    "bf16 matrix product",
    *[f"decode step, {shape}, batch {batch}" for shape in SHAPES for batch in (1, 32, 128)],
    *[f"prefill, {shape}, {length}" for shape in SHAPES for length in ("2k", "8k")],
    *[f"GPU idle between steps, {shape}, batch 32" for shape in SHAPES],
    *[f"decode step with drafts, 8B and 1B, batch {batch}" for batch in (1, 32)],
    "paged decode attention, 8B, batch 32, 1k",
    "paged decode attention beside flashinfer, 8B, batch 32, 1k",
    "gather of 8k tokens, 8B",
    "scatter of 8k tokens, 8B",
    "sampler, top-k and top-p, batch 32",
    "split, 8k: TTFT",
    "split, 8k: first gap",
    "split, 8k: transfer hidden behind prefill",
    "8B, batch 32: beside transformers' continuous batching, as it comes",
    "8B, batch 32: beside transformers' continuous batching, graphs and async",
]
ELSEWHERE = {"split", "transformers"}
"""Sections that start servers or import transformers: the whole rehearsal has them."""
NEEDS_GPU = "RuntimeError: flashinfer needs a GPU"


def in_process(job, limits):
    """A section without a process of its own."""
    if job.section in ELSEWHERE:
        raise ChildDied("not here")
    messages = []
    child.run(job, messages.append)
    yield from messages


@pytest.fixture
def report(monkeypatch):
    def refuse(*arguments):
        raise RuntimeError("a row | that fails")

    monkeypatch.setattr(sampler, "as_served", refuse)
    monkeypatch.setattr(gpu, "spawn", in_process)
    return gpu.measure(catalogue(), gpu.parser().parse_args(["--device", "cpu", "--rehearse"]))


def test_every_promised_row_is_there_and_a_failure_is_its_own(report):
    rows = {row["name"]: row for row in report["rows"]}
    table = gpu.markdown(report)
    for name in PROMISED:
        assert f"| {name} |" in table
    errors = {name: row["error"] for name, row in rows.items() if row["section"] not in ELSEWHERE}
    assert {name: error for name, error in errors.items() if error} == {
        "sampler, top-k and top-p, batch 32, as the engine calls it": "RuntimeError: a row | that fails",
        "paged decode attention beside flashinfer, 8B, batch 32, 1k": NEEDS_GPU,
        "sampler beside flashinfer, top-k and top-p, batch 32": NEEDS_GPU,
    }
    assert {row["error"] for row in rows.values() if row["section"] in ELSEWHERE} == {"not here"}
    measured = [row for row in rows.values() if row["measured"] is not None]
    assert {row["verdict"] for row in measured} == {"rehearsed"}
    assert all(row["measured"] > 0 for row in measured if row["unit"] != "%")
    assert all(row["floor"] for row in measured if row["section"] not in ("ceilings",) and row["unit"] != "%")


@pytest.mark.long
@pytest.mark.timeout(400)
def test_the_whole_rehearsal_in_processes(tmp_path):
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--device",
        "cpu",
        "--rehearse",
        "--out",
        str(tmp_path),
    ]
    subprocess.run(command, check=True, timeout=390, capture_output=True)
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    unmeasured = {row["name"]: row["error"] for row in rows if row["measured"] is None}
    assert all("GPU" in error or "cuda" in error for error in unmeasured.values()), unmeasured
    assert len(rows) == len(catalogue())
