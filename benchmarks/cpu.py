"""Tandem beside its peers on CPUs: `make bench-cpu`.

Every arm is a process that waits between rounds; the arms take turns, forwards and then backwards, so that
whatever else the machine does falls on all of them. CPU time hardly depends on other load, wall time does.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import cpu_report
from benchmarks.cpu_load import make_job, write_checkpoint
from benchmarks.machine import machine
from benchmarks.peers import environments
from benchmarks.peers.arm import Job, Round

ROOT = Path(__file__).resolve().parents[1]
PEERS = Path(__file__).parent / "peers"
WORKSPACE = ROOT / ".venv-peers"
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class ArmSpec:
    """One thing that is measured."""

    name: str
    python: Callable[[], Path]
    """The interpreter that runs it, installed when it is asked for."""
    program: tuple[str, ...]
    max_num_batched_tokens: int


def arm_specs() -> list[ArmSpec]:
    """All arms, in the order of their first turns."""

    def transformers() -> Path:
        return environments.TRANSFORMERS.python(WORKSPACE)

    def openvino() -> Path:
        environments.export_openvino(WORKSPACE, checkpoint())
        return environments.OPENVINO.python(WORKSPACE)

    def ours() -> Path:
        return Path(sys.executable)

    peer_openvino = (str(PEERS / "openvino_genai_cb.py"),)
    return [
        ArmSpec("transformers", transformers, (str(PEERS / "transformers_cb.py"),), 1024),
        ArmSpec("openvino-genai", openvino, peer_openvino, 2048),
        ArmSpec("openvino-genai, chunks of 256", openvino, peer_openvino, 256),
        ArmSpec("tandem engine", ours, ("-m", "benchmarks.peers.tandem_engine"), 2048),
        ArmSpec("tandem engine, chunks of 256", ours, ("-m", "benchmarks.peers.tandem_engine"), 256),
        ArmSpec("tandem up", ours, ("-m", "benchmarks.peers.tandem_split"), 512),
        ArmSpec("tandem up, chunks of 256", ours, ("-m", "benchmarks.peers.tandem_split"), 256),
    ]


@dataclass(kw_only=True)
class Measured:
    """What came of one arm."""

    name: str
    max_num_batched_tokens: int
    versions: dict[str, str] = field(default_factory=dict)
    rounds: list[Round] = field(default_factory=list)
    error: str | None = None
    """Why it did not run; its rounds do not count."""


class Arm:
    """A running arm."""

    def __init__(self, spec: ArmSpec, job: Job) -> None:
        self.measured = Measured(name=spec.name, max_num_batched_tokens=spec.max_num_batched_tokens)
        self._job = job
        self._log = WORKSPACE / f"{spec.program[-1].rsplit('/', 1)[-1]}.log"
        self._process: subprocess.Popen[str] | None = None
        try:
            self._process = self._start(spec)
            self.measured.versions = self._answer()["versions"]
            self._round()  # the first is the warm-up
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            self._fail(error)

    def _start(self, spec: ArmSpec) -> "subprocess.Popen[str]":
        job_file = WORKSPACE / "job.json"
        job_file.write_text(json.dumps(asdict(self._job)))
        environment = os.environ | {
            "OMP_NUM_THREADS": str(self._job.threads),
            "OMP_WAIT_POLICY": "passive",
            "GOMP_SPINCOUNT": "0",
            "HF_HUB_OFFLINE": "1",
        }
        cpus = sorted(os.sched_getaffinity(0))[: self._job.threads]
        with self._log.open("w") as log:
            return subprocess.Popen(
                ["taskset", "-c", ",".join(map(str, cpus)), str(spec.python()), *spec.program, str(job_file)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT,
                env=environment,
            )  # fmt: skip

    def round(self) -> None:
        """One more measured round, unless the arm has failed."""
        if self.measured.error is None:
            try:
                self.measured.rounds.append(self._round())
            except RuntimeError as error:
                self._fail(error)

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                self._process.kill()

    def _round(self) -> Round:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise RuntimeError(self._last_words()) from error
        result = Round(**self._answer())
        lens = [len(output) for output in result.outputs]
        if lens != self._job.output_lens:
            raise RuntimeError(
                f"{sum(lens)} of {sum(self._job.output_lens)} tokens came: {self._last_words()}"
            )
        return result

    def _answer(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _last_words(self) -> str:
        lines = self._log.read_text().strip().splitlines()
        return lines[-1][:200] if lines else "it ended without a word"

    def _fail(self, error: Exception) -> None:
        self.measured.error = str(error)
        self.measured.rounds = []


def checkpoint() -> Path:
    """The directory of the model, written once."""
    path = WORKSPACE / "model"
    if not (path / "tokenizer_config.json").is_file():
        write_checkpoint(path)
    return path


def measure(threads: int, dtype: str, num_rounds: int, names: Sequence[str]) -> list[Measured]:
    """All arms in turns: first to last, then last to first."""
    arms = []
    for spec in arm_specs():
        if not names or spec.name in names:
            job = make_job(
                checkpoint(), WORKSPACE / "openvino-model", dtype=dtype, threads=threads,
                max_num_batched_tokens=spec.max_num_batched_tokens,
            )  # fmt: skip
            arms.append(Arm(spec, job))
    for index in range(num_rounds):
        for each in arms if index % 2 == 0 else reversed(arms):
            each.round()
    for each in arms:
        each.stop()
    return [each.measured for each in arms]


def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 itself; elsewhere torch converts, and nobody wins."""
    flags = Path("/proc/cpuinfo").read_text()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def main() -> None:
    """Measure, write results/cpu.json and results/cpu.md, print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="threads and cores of an arm")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds of each arm")
    parser.add_argument("--arms", nargs="+", default=[], help="names of arms; all if not given")
    options = parser.parse_args()
    WORKSPACE.mkdir(exist_ok=True)
    RESULTS.mkdir(exist_ok=True)
    dtypes = ["float32", "bfloat16"] if has_bfloat16() else ["float32"]
    report = machine() | {"dtypes": dtypes, "runs": []}
    for dtype in dtypes:
        for threads in options.threads:
            measured = measure(threads, dtype, options.rounds, options.arms)
            report["runs"].append(
                {"dtype": dtype, "threads": threads, "arms": [cpu_report.summary(each) for each in measured]}
            )
    report["load_average_at_end"] = os.getloadavg()[0]
    cpu_report.compare(report["runs"])
    (RESULTS / "cpu.json").write_text(json.dumps(report, indent=2) + "\n")
    table = cpu_report.table(report)
    (RESULTS / "cpu.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
