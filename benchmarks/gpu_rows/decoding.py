"""Engines in the middle of decoding, step by step by the wall."""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.gpu_rows.bench import Bench
from benchmarks.gpu_rows.serving import start_decoding, stop_decoding
from benchmarks.gpu_rows.timing import Timing
from engine.engine import Engine

CONTEXT_LEN = 1024
WARM_UPS = 8


def context_len(bench: Bench) -> int:
    """Of requests that begin to decode."""
    return bench.pick(CONTEXT_LEN, 64)


@contextmanager
def decoding(bench: Bench, engine: Engine, batch: int) -> Iterator[None]:
    """So many requests decode in the engine, which is warm."""
    requests = start_decoding(engine, batch, context_len(bench))
    try:
        for _ in range(WARM_UPS):
            engine.step()
        if not bench.rehearsal:  # a collection takes longer than all tiny steps
            gc.collect()
            gc.freeze()
        yield
    finally:
        gc.unfreeze()
        stop_decoding(engine, requests)


def time_steps(engine: Engine, num_steps: int) -> Timing:
    """Seconds of a step."""
    return Timing.of([_step_s(engine) for _ in range(num_steps)])


def _step_s(engine: Engine) -> float:
    start = time.perf_counter()
    engine.step()
    return time.perf_counter() - start
