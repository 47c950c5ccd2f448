"""What a decode step costs: against batch size, context, pool size and the number of waiting requests.

`python -m benchmarks.engine_cost` prints bars and writes results/engine_cost.json. Times are CPU time of this
process on one thread, the least of several steps. Only batch and context may matter; pool, finished requests
and queue must not. Beside it: what of a step is the host's, around the model and around a captured step, and
what it costs to tell a captured step its inputs, with the block tables of the step before and with others.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.cpu_load import CONFIG, write_checkpoint
from engine.batch import MIN_ROWS, Span
from engine.block_table import BlockTable
from engine.config import EngineConfig
from engine.engine import Engine
from engine.loader import LoadedModel, load_model
from engine.models.inputs import FinalRows
from engine.request import Request, SamplingParams
from engine.step.inputs import StepInputs
from engine.step.shapes import StepShape
from kernels import ops
from kernels.attention import AttentionBatch

RESULTS = Path(__file__).parent / "results"
CHECKPOINT = Path(__file__).resolve().parents[1] / ".venv-peers" / "model"
NUM_STEPS = 12
BAR = 40
DEFAULT = {"batch": 32, "context": 256, "pool": 2048, "queue": 0, "finished": 0}
SWEEPS = {
    "batch": (1, 4, 16, 32, 64),
    "context": (32, 128, 256, 512, 900),
    "pool": (2048, 16384),
    "queue": (0, 1000),
    "finished": (0, 300),
}

HOST_BATCHES = (1, 32, 128)
INPUT_CONTEXTS = (1024, 8192)
MAX_MODEL_LEN = 131072
"""Of the steps whose inputs are measured: it is the width of their block tables."""
BLOCK_SIZE = 16


def request(key: object, prompt_len: int, max_tokens: int) -> Request:
    prompt = [
        3 + (position * 7919 + hash(key)) % (CONFIG["vocab_size"] - 3) for position in range(prompt_len)
    ]
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return Request(key=key, prompt_token_ids=prompt, sampling=sampling)


def decoding_engine(model: LoadedModel, case: dict[str, int]) -> Engine:
    """An engine in the middle of decoding, with the case's history and queue."""
    config = EngineConfig(
        dtype="float32",
        num_blocks=case["pool"],
        max_num_seqs=case["batch"],
        overlap="on" if case.get("overlap") else "off",
    )
    engine = Engine(config, model)
    for index in range(case["finished"]):
        engine.submit(request(("finished", index), 1, 1))
    while engine.has_work():
        engine.step()
    for index in range(case["batch"]):
        engine.submit(request(index, case["context"], 200))
    while engine.load().queued_prefill_tokens:
        engine.step()
    for index in range(case["queue"]):
        engine.submit(request(("queued", index), 32, 1))
    return engine


def step_ms(model: LoadedModel, case: dict[str, int]) -> float:
    """CPU milliseconds of a decode step."""
    engine = decoding_engine(model, case)
    times = []
    for _ in range(NUM_STEPS):
        start = time.process_time()
        engine.step()
        times.append(time.process_time() - start)
    return min(times) * 1e3


class NoModel:
    """Answers at once, so that what remains of a step is schedule, batch, sampler and commit."""

    def __init__(self, batch: int) -> None:
        self._hidden = torch.zeros(2048, 1)
        self._logits = torch.zeros(max(batch, MIN_ROWS), CONFIG["vocab_size"])

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_group: torch.Tensor,
        slot_mapping: torch.Tensor,
        attention: AttentionBatch,
        final: FinalRows | None = None,
    ) -> torch.Tensor:
        attention.decode_rows  # made on demand: part of a real step  # noqa: B018
        return self._hidden[: len(token_ids)]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._logits[: len(hidden)]


def host_ms(model: LoadedModel, batch: int) -> float:
    """CPU milliseconds of a step around the model, without `passes_ms`."""
    case = DEFAULT | {"batch": batch, "pool": 4096}
    return step_ms(dataclasses.replace(model, module=NoModel(batch)), case) - passes_ms(batch)


def passes_ms(batch: int) -> float:
    """Of the sampler's two passes over a step's logits."""
    logits = torch.zeros(batch, CONFIG["vocab_size"])
    return 1e3 * min(timed(lambda: (ops.finite_best(logits), ops.argmax(logits))) for _ in range(NUM_STEPS))


def overlapped_host_ms(model: LoadedModel, batch: int) -> float:
    """CPU milliseconds of an overlapped step without what its device computes."""
    case = DEFAULT | {"batch": batch, "pool": 4096, "overlap": 1}
    engine = decoding_engine(dataclasses.replace(model, module=NoModel(batch)), case)
    engine.step()
    graphs = engine._runner._graphs
    assert graphs is not None
    graphs._replays = dict.fromkeys(graphs._replays, lambda: None)
    return 1e3 * min(timed(engine.step) for _ in range(NUM_STEPS))


def timed(run: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def inputs_ms(batch: int, context: int, *, other_tables: bool) -> float:
    """CPU milliseconds of telling a captured step its inputs, mean over the filling of a block.

    other_tables: every row has another request than in the step before.
    """
    inputs = StepInputs(
        max_num_seqs=batch,
        max_num_rows=max(batch, MIN_ROWS),
        max_model_len=MAX_MODEL_LEN,
        block_size=BLOCK_SIZE,
        device=torch.device("cpu"),
    )
    tables = [BlockTable(range(-(-(context + 32) // BLOCK_SIZE))) for _ in range(batch)]
    seconds = []
    for step in range(1 + BLOCK_SIZE):
        if other_tables:
            tables = list(map(BlockTable, tables))
        starts = [context + step + seq % BLOCK_SIZE for seq in range(batch)]
        spans = [
            Span(table=table, start=start, token_ids=[3]) for table, start in zip(tables, starts, strict=True)
        ]
        seconds.append(timed(partial(inputs.fill, StepShape(batch, 1), spans)))
    return 1e3 * sum(seconds[1:]) / BLOCK_SIZE


def host_costs(model: LoadedModel) -> dict[str, Any]:
    """All that is the host's, by batch, of the inputs also by context."""
    return {
        "around_the_model_ms": {batch: host_ms(model, batch) for batch in HOST_BATCHES},
        "around_a_captured_step_ms": {batch: overlapped_host_ms(model, batch) for batch in HOST_BATCHES},
        "inputs_ms": {
            batch: {
                context: {
                    name: inputs_ms(batch, context, other_tables=name == "other tables")
                    for name in ("same tables", "other tables")
                }
                for context in INPUT_CONTEXTS
            }
            for batch in HOST_BATCHES
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine_cost", description=__doc__)
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not (CHECKPOINT / "tokenizer_config.json").is_file():
        write_checkpoint(CHECKPOINT)
    model = load_model(CHECKPOINT, EngineConfig(dtype="float32"))
    results: dict[str, Any] = {"default": DEFAULT, "host": host_costs(model), "step_ms": {}}
    for name in options.sweeps:
        costs = {value: step_ms(model, DEFAULT | {name: value}) for value in SWEEPS[name]}
        results["step_ms"][name] = costs
        largest = max(costs.values())
        for value, cost in costs.items():
            print(f"{name:9}{value:6}  {cost:7.2f} ms  {'█' * round(cost / largest * BAR)}", flush=True)
    print(json.dumps(results["host"], indent=2))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "engine_cost.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
