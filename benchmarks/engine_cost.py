"""What a decode step costs: against batch size, context, pool size and the number of waiting requests.

`python -m benchmarks.engine_cost` prints bars and writes results/engine_cost.json. Times are CPU time of this
process on one thread, the least of several steps. Only batch and context may matter; pool, finished requests
and queue must not.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

import torch

from benchmarks.cpu_load import CONFIG, write_checkpoint
from engine.config import EngineConfig
from engine.engine import Engine
from engine.loader import LoadedModel, load_model
from engine.models.inputs import FinalRows
from engine.request import Request, SamplingParams
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


def request(key: object, prompt_len: int, max_tokens: int) -> Request:
    prompt = [
        3 + (position * 7919 + hash(key)) % (CONFIG["vocab_size"] - 3) for position in range(prompt_len)
    ]
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return Request(key=key, prompt_token_ids=prompt, sampling=sampling)


def decoding_engine(model: LoadedModel, case: dict[str, int]) -> Engine:
    """An engine in the middle of decoding, with the case's history and queue."""
    config = EngineConfig(dtype="float32", num_blocks=case["pool"], max_num_seqs=case["batch"])
    engine = Engine(config, model)
    for index in range(case["finished"]):
        engine.submit(request(("finished", index), 1, 1))
    while engine.has_work():
        engine.step()
    for index in range(case["batch"]):
        engine.submit(request(index, case["context"], 64))
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

    def __init__(self) -> None:
        self._hidden = torch.zeros(2048, 1)
        self._logits = torch.zeros(DEFAULT["batch"], CONFIG["vocab_size"])

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_group: torch.Tensor,
        slot_mapping: torch.Tensor,
        attention: AttentionBatch,
        final: FinalRows | None,
    ) -> torch.Tensor:
        attention.decode_rows  # made on demand: part of a real step  # noqa: B018
        return self._hidden[: len(token_ids)]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._logits[: len(hidden)]


def host_ms(model: LoadedModel) -> float:
    """CPU milliseconds of a step of DEFAULT around the model, without `passes_ms`."""
    return step_ms(dataclasses.replace(model, module=NoModel()), DEFAULT) - passes_ms()


def passes_ms() -> float:
    """Of the sampler's two passes over a step's logits, which are torch's."""
    logits = torch.zeros(DEFAULT["batch"], CONFIG["vocab_size"])
    times = []
    for _ in range(NUM_STEPS):
        start = time.process_time()
        logits.amax(-1)
        logits.argmax(-1)
        times.append(time.process_time() - start)
    return min(times) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine_cost", description=__doc__)
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not (CHECKPOINT / "tokenizer_config.json").is_file():
        write_checkpoint(CHECKPOINT)
    model = load_model(CHECKPOINT, EngineConfig(dtype="float32"))
    results = {"default": DEFAULT, "host_ms": host_ms(model), "step_ms": {}}
    for name in options.sweeps:
        costs = {value: step_ms(model, DEFAULT | {name: value}) for value in SWEEPS[name]}
        results["step_ms"][name] = costs
        largest = max(costs.values())
        for value, cost in costs.items():
            print(f"{name:9}{value:6}  {cost:7.2f} ms  {'█' * round(cost / largest * BAR)}", flush=True)
    print(f"Around the model: {results['host_ms']:.2f} ms per step beside the passes over the logits")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "engine_cost.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
