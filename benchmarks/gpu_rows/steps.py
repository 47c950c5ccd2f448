"""The served step of one shape: decode and prefill as wall time, and what the GPU does in it.

A step is `Engine.step`: schedule, batch, model, sampler and commit, until its tokens are known on the host.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from benchmarks.gpu_rows import drafts, floors
from benchmarks.gpu_rows.bench import Bench, RowFunctions, scaled
from benchmarks.gpu_rows.busy import busy
from benchmarks.gpu_rows.catalogue import BATCHES, IDLE_BATCH, PROMPTS, WITHOUT
from benchmarks.gpu_rows.decoding import WARM_UPS, context_len, decoding, time_steps
from benchmarks.gpu_rows.models import random_model
from benchmarks.gpu_rows.row import Measured
from benchmarks.gpu_rows.serving import (
    ROOM,
    engine_config,
    make_engine,
    make_request,
    prefill,
)
from benchmarks.gpu_rows.timing import time_wall
from engine.engine import Engine

PREFILL_WARM_UPS = 2
PROFILED_STEPS = 12


def rows(bench: Bench) -> RowFunctions:
    """See catalogue.steps; the section is the shape's name."""
    section = bench.section
    steps = Steps(bench, section)
    functions = {
        f"decode step, {section}, batch {batch}": partial(steps.decode_row, batch) for batch in BATCHES
    }
    functions |= {
        f"prefill, {section}, {name}": partial(steps.prefill_row, prompt_len)
        for name, prompt_len in PROMPTS.items()
    }
    functions[f"GPU idle between steps, {section}, batch {IDLE_BATCH}"] = steps.idle_row
    functions |= {
        f"decode step without {name}, {section}, batch {IDLE_BATCH}": partial(
            steps.decode_row, IDLE_BATCH, **switches
        )
        for name, switches in WITHOUT.items()
    }
    return functions | drafts.rows(bench, steps.model)


class Steps:
    """A model of one shape and an engine over it; at most one engine lives at a time."""

    def __init__(self, bench: Bench, name: str) -> None:
        self._bench = bench
        self._shape = bench.shape(name)
        self._batches = bench.pick(BATCHES, (1, 2, 4))
        max_model_len = bench.pick(max(PROMPTS.values()) + ROOM, 512)
        self.model = random_model(bench, self._shape, max_model_len)
        self._config = engine_config(
            bench, max_model_len=max_model_len, batches=self._batches,
            tokens=max(self._batches) * (context_len(bench) + ROOM),
        )  # fmt: skip
        self._engine: tuple[Mapping[str, str], Engine] | None = None

    def decode_row(self, batch: int, **switches: str) -> Measured:
        """A step of a batch with contexts of about 1k; `switches` are fields of EngineConfig."""
        num_steps = self._bench.pick(120, 3)
        with self._decoding(batch, switches) as engine:
            timing = time_steps(engine, num_steps)
        context = context_len(self._bench) + WARM_UPS + num_steps / 2
        kv_read = floors.decode_bytes(self._shape, self._batch(batch), context)
        flops = floors.decode_flops(self._shape, self._batch(batch))
        floor = self._bench.floor_s(read=kv_read, flops=flops)
        details = timing.details | {
            "context": context, "GB": round(kv_read * 1e-9, 3),
            "tokens/s": round(self._batch(batch) / timing.seconds, 1),
        }  # fmt: skip
        return Measured(value=timing.seconds * 1e3, floor=scaled(floor, 1e3), details=details)

    def prefill_row(self, prompt_len: int) -> Measured:
        """A prompt in one chunk of its own, until its first token is known; no two prompts share a prefix."""
        prompt_len = self._bench.pick(prompt_len, prompt_len // 64)
        engine, rounds = self._make_engine({}), self._bench.pick(7, 2)
        prompts = [
            make_request(self._shape.vocab, prompt_len, 1, prefill_only=True)
            for _ in range(PREFILL_WARM_UPS + rounds)
        ]
        calls = [partial(prefill, engine, prompt) for prompt in prompts]
        timing = time_wall(self._bench, calls, rounds=rounds, warm_ups=PREFILL_WARM_UPS)
        flops = floors.prefill_flops(self._shape, prompt_len)
        details = timing.details | {
            "TFLOP": round(flops * 1e-12, 3), "tokens/s": round(prompt_len / timing.seconds),
        }  # fmt: skip
        floor = scaled(self._bench.floor_s(flops=flops), 1e3)
        return Measured(value=timing.seconds * 1e3, floor=floor, details=details)

    def idle_row(self) -> Measured:
        """The share of a step's wall time in which the device does nothing."""
        with self._decoding(IDLE_BATCH, {}) as engine:
            num_steps = self._bench.pick(PROFILED_STEPS, 2)
            wall = time_steps(engine, 5 * num_steps)
            seen = busy(self._bench, lambda: [engine.step() for _ in range(num_steps)])
        busy_s = seen.seconds / num_steps
        details = wall.details | {
            "wall ms": round(wall.seconds * 1e3, 4), "busy ms": round(busy_s * 1e3, 4),
            "kernels per layer": round(seen.num_kernels / num_steps / self._shape.num_layers, 2),
        }  # fmt: skip
        return Measured(value=max(1 - busy_s / wall.seconds, 0.0) * 100, details=details)

    def _batch(self, batch: int) -> int:
        """The size that stands for it in this run."""
        return self._batches[BATCHES.index(batch)]

    @contextmanager
    def _decoding(self, batch: int, switches: Mapping[str, str]) -> Iterator[Engine]:
        """An engine in the middle of decoding."""
        engine = self._make_engine(switches)
        with decoding(self._bench, engine, self._batch(batch)):
            yield engine

    def _make_engine(self, switches: Mapping[str, str]) -> Engine:
        if self._engine is None or self._engine[0] != switches:
            self._engine = None
            self._engine = (switches, make_engine(self.model, replace(self._config, **switches)))
        return self._engine[1]
