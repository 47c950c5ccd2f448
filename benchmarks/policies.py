"""Scheduling policies on recorded traces: `make bench-policies`.

The real scheduler and policies over a fake runner: a step costs what a fitted model of an A100 says, on a
clock that only the simulation moves. Two public traces and a drawn load with a heavy tail, played at a speed
at which requests queue. Prints job completion times (JCT) and times to first token (TTFT), the best of each
column marked, and writes JSON.

The feedback queue favours short requests without knowing which are short. That pays in mean JCT where lengths
vary much more than their mean (the drawn load), as FastServe claims; in the two traces they do not, and first
come, first served is ahead. Copies to and from the host cost the feedback queue more, unless they are hidden.
"""

import csv
import heapq
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine.block_tables import BlockTables
from engine.plan import Scheduled
from engine.policy import PolicyName, make_policy
from engine.request import Request, RequestState, SamplingParams
from engine.scheduler import Scheduler
from engine.swap_space import SwapSpace
from runtime.clock import ManualClock

TRACES = Path(__file__).parent / "traces"
BLOCK_SIZE = 16
MAX_NUM_SEQS = 256
MAX_NUM_BATCHED_TOKENS = 2048
HIGH_PRIORITY_SHARE = 0.2
"""Of the requests, drawn at random, have priority 1; only the policy by priority looks at it."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a step costs. Coefficients: DistServe's profile of OPT-13B on A100-80G, in milliseconds."""

    name: str
    prefill: tuple[float, float, float]
    """Constant, per token, per squared token of the prompt."""
    decode_small: tuple[float, float, float]
    """Constant, per token of context, per request; up to `small_batch` requests."""
    decode_large: tuple[float, float, float]
    small_batch: int
    kv_tokens: int
    """Size of the KV pool (DistServe's max_num_tokens)."""
    swap_ms_per_block: float
    """819,200 bytes per token (40 layers, 2 x 5120, fp16) at 20 GB/s per GPU, what PCIe 4.0 x16 gives."""
    swap_tokens: int = 400_000
    """Host memory, in tokens."""

    def step_ms(self, plan: Sequence[Scheduled]) -> float:
        """One batch of chunks and decodes: the work adds up, the constant is paid once."""
        decodes = [item for item in plan if item.request.state is RequestState.RUNNING]
        chunks = [item for item in plan if item.request.state is RequestState.PREFILLING]
        constant, work = 0.0, 0.0
        if chunks:
            constant, per_token, per_square = self.prefill
            for item in chunks:
                start, end = item.request.num_computed_tokens, item.context_len
                work += per_token * item.query_len + per_square * (end**2 - start**2)
        if decodes:
            small = len(decodes) <= self.small_batch
            fixed, per_token, per_request = self.decode_small if small else self.decode_large
            constant = max(constant, fixed)
            work += per_token * sum(item.context_len for item in decodes) + per_request * len(decodes)
        return constant + work


ONE_GPU = Machine(
    name="OPT-13B, 1 A100",
    prefill=(18.1025, 0.101912, 7.12226e-06),
    decode_small=(19.9347, 0.000626936, 0.0385070),
    decode_large=(7.16619, 0.000579800, 0.158311),
    small_batch=95,
    kv_tokens=66_144,
    swap_ms_per_block=0.655,
)
FOUR_GPUS = Machine(
    name="OPT-13B, 4 A100",
    prefill=(12.0623, 0.0380814, 5.22625e-07),
    decode_small=(10.2563, 0.000187867, 0.0326927),
    decode_large=(10.4835, 0.000171209, 0.0456645),
    small_batch=95,
    kv_tokens=356_752,
    swap_ms_per_block=0.164,
)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One line of the result."""

    name: str
    policy: PolicyName
    copies_cost: bool = True
    """False: as if copies to and from the host were hidden behind the steps, which the engine does not do."""


ARMS = (
    Arm(name="fcfs", policy="fcfs"),
    Arm(name="priority", policy="priority"),
    Arm(name="mlfq", policy="mlfq"),
    Arm(name="mlfq, copies hidden", policy="mlfq", copies_cost=False),
)


Row = tuple[float, int, int]
"""Arrival in milliseconds, prompt tokens, output tokens."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """Requests and how they are played."""

    name: str
    rows: Callable[[], Sequence[Row]]
    machine: Machine
    time_scale: float = 1.0
    """Gaps are multiplied by it: the machine is busy all the time and a queue comes and goes."""


def recorded(file: str) -> Callable[[], Sequence[Row]]:
    """The requests of a trace file."""

    def rows() -> Sequence[Row]:
        with (TRACES / file).open() as lines:
            return [(int(at), int(prompt), int(output)) for at, prompt, output in list(csv.reader(lines))[1:]]

    return rows


def heavy_tailed() -> Sequence[Row]:
    """Poisson arrivals, prompts of 32 to 256 tokens, log-normal outputs: median 60, mean 180, up to 4000."""
    rng, at_ms, rows = random.Random(0), 0.0, list[Row]()
    for _ in range(2000):
        at_ms += rng.expovariate(1 / HEAVY_TAILED_GAP_MS)
        rows.append((at_ms, rng.randint(32, 256), min(1 + int(rng.lognormvariate(4.1, 1.5)), 4000)))
    return rows


HEAVY_TAILED_GAP_MS = 70.0

LOADS = (
    Load(name="azure-conv", rows=recorded("azure_conv_2023.csv"), machine=ONE_GPU, time_scale=1.8),
    Load(
        name="mooncake-conv",
        rows=recorded("mooncake_conversation.csv"),
        machine=FOUR_GPUS,
        time_scale=5.5,
    ),
    Load(name="heavy tail", rows=heavy_tailed, machine=ONE_GPU),
)


@dataclass(eq=False, kw_only=True, slots=True)
class Job:
    """One request of the trace and what became of it; seconds."""

    arrival: float
    request: Request
    first_token: float = 0.0
    end: float = 0.0


class CountingMover:
    """Copies nothing, but knows what the copies would cost."""

    def __init__(self) -> None:
        self.num_blocks = 0

    def store(self, block_tables: Sequence[Sequence[int]], slots: Sequence[int]) -> None:
        self.num_blocks += len(slots)

    def load(self, slots: Sequence[int], block_tables: Sequence[Sequence[int]]) -> None:
        self.num_blocks += len(slots)

    def take(self) -> int:
        num_blocks, self.num_blocks = self.num_blocks, 0
        return num_blocks


@dataclass(eq=False)
class Simulation:
    """One trace under one policy."""

    load: Load
    arm: Arm
    num_requests: int
    preemptions: Counter[str] = field(default_factory=Counter)
    num_steps: int = 0

    def __post_init__(self) -> None:
        machine = self.load.machine
        self._clock = ManualClock()
        self._mover = CountingMover()
        num_blocks = machine.kv_tokens // BLOCK_SIZE
        tables = BlockTables(num_groups=1, num_blocks=num_blocks, block_size=BLOCK_SIZE)
        self._scheduler = Scheduler(
            tables,
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
            policy=make_policy(self.arm.policy, self._clock),
            preemption="swap",
            swap_space=SwapSpace(tables, self._mover, num_slots=machine.swap_tokens // BLOCK_SIZE),
        )
        self.jobs = read_trace(self.load, self.num_requests)

    def run(self) -> "Simulation":
        """All requests to their ends."""
        arrivals = [(job.arrival, index) for index, job in enumerate(self.jobs)]
        heapq.heapify(arrivals)
        while arrivals or self._scheduler.live:
            while arrivals and arrivals[0][0] <= self._clock.now():
                self._scheduler.submit(self.jobs[heapq.heappop(arrivals)[1]].request)
            if self._scheduler.has_work():
                self._step()
            else:
                self._clock.advance(arrivals[0][0] - self._clock.now())
        self._scheduler.check()
        return self

    def _step(self) -> None:
        plan = self._scheduler.schedule()
        machine = self.load.machine
        copies_ms = machine.swap_ms_per_block * self._mover.take() * self.arm.copies_cost
        self._clock.advance((machine.step_ms(plan) + copies_ms) / 1e3)
        self._scheduler.charge(plan)
        self.preemptions.update(item.mode.value for item in self._scheduler.take_preempted())
        self.num_steps += 1
        for item in plan:
            self._commit(item)

    def _commit(self, item: Scheduled) -> None:
        request, samples = item.request, item.samples
        request.num_computed_tokens += item.query_len
        if not samples:
            return
        if request.state is RequestState.PREFILLING:
            self._scheduler.start_decoding(request)
        job = self.jobs[request.key]
        job.first_token = job.first_token or self._clock.now()
        request.output_token_ids.append(0)
        if len(request.output_token_ids) == request.sampling.max_tokens:
            job.end = self._clock.now()
            self._scheduler.finish(request)


def read_trace(load: Load, num_requests: int) -> list[Job]:
    """The first requests of a load, in order of arrival."""
    rng = random.Random(0)
    return [
        Job(
            arrival=arrival_ms / 1e3 * load.time_scale,
            request=Request(
                key=index,
                prompt_token_ids=range(prompt_tokens),
                sampling=SamplingParams(max_tokens=max(output_tokens, 1)),
                priority=int(rng.random() < HIGH_PRIORITY_SHARE),
            ),
        )
        for index, (arrival_ms, prompt_tokens, output_tokens) in enumerate(load.rows()[:num_requests])
    ]


def summary(simulation: Simulation) -> dict[str, float]:
    """Seconds, over all requests and over those of high priority."""
    jobs = simulation.jobs
    jct = [job.end - job.arrival for job in jobs]
    ttft = [job.first_token - job.arrival for job in jobs]
    high = [job.end - job.arrival for job in jobs if job.request.priority]
    per_token = [t / job.request.sampling.max_tokens for t, job in zip(jct, jobs, strict=True)]
    return {
        "mean_jct_s": statistics.fmean(jct),
        "p99_jct_s": _quantile(jct, 0.99),
        "mean_ttft_s": statistics.fmean(ttft),
        "p99_ttft_s": _quantile(ttft, 0.99),
        "mean_jct_per_token_s": statistics.fmean(per_token),
        "mean_jct_high_priority_s": statistics.fmean(high) if high else 0.0,
        "makespan_s": max(job.end for job in jobs),
    }


def _quantile(values: Sequence[float], quantile: float) -> float:
    return sorted(values)[min(int(len(values) * quantile), len(values) - 1)]


def simulate(num_requests: int = 2000, loads: Sequence[Load] = LOADS) -> list[dict[str, object]]:
    """One row per trace and policy."""
    rows: list[dict[str, object]] = []
    for load in loads:
        for arm in ARMS:
            started = time.process_time()
            simulation = Simulation(load, arm, num_requests).run()
            rows.append(
                {
                    "trace": load.name,
                    "machine": load.machine.name,
                    "time_scale": load.time_scale,
                    "policy": arm.name,
                    **summary(simulation),
                    "preemptions": dict(simulation.preemptions),
                    "steps": simulation.num_steps,
                    "cpu_s": time.process_time() - started,
                }
            )
    return rows


COLUMNS = {
    "mean_jct_s": "mean JCT",
    "p99_jct_s": "p99 JCT",
    "mean_ttft_s": "mean TTFT",
    "p99_ttft_s": "p99 TTFT",
    "mean_jct_per_token_s": "JCT/token",
    "mean_jct_high_priority_s": "JCT of the 20 %",
}


def table(rows: Sequence[dict[str, object]]) -> str:
    """Markdown; seconds; * marks the best of a trace."""
    lines = [
        "| trace | policy | " + " | ".join(COLUMNS.values()) + " | preempted |",
        "|---|---|" + "---:|" * (len(COLUMNS) + 1),
    ]
    for row in rows:
        same = [other for other in rows if other["trace"] == row["trace"]]
        cells = []
        for name in COLUMNS:
            best = min(other[name] for other in same)
            cells.append(f"{row[name]:.2f}" + ("*" if row[name] == best else ""))
        num_preempted = sum(row["preemptions"].values())
        lines.append(f"| {row['trace']} | {row['policy']} | {' | '.join(cells)} | {num_preempted} |")
    return "\n".join(lines)


def main() -> None:
    rows = simulate()
    print(table(rows))
    results = Path(__file__).parent / "results" / "policies.json"
    results.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
