"""How long something takes: by the device's own events over graph replays, or by the wall."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice

import torch

from benchmarks.gpu_rows.bench import Bench

Call = Callable[[], object]

CALLS_PER_REPLAY = 32
"""So many, at least, lie in one graph: the events around it then cost nothing."""
L2_TIMES = 4
"""Rotating inputs have so many times the size of the L2 cache, so that each is read from memory."""
MAX_SETS = 64


@dataclass(frozen=True)
class Timing:
    """Seconds of one call."""

    seconds: float
    """Median over the rounds."""
    spread: float
    """Between the quartiles, as a share of the median."""
    rounds: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Timing":
        """From one value for each round."""
        median = statistics.median(samples)
        quartiles = statistics.quantiles(samples, n=4) if len(samples) > 1 else [median] * 3
        return cls(median, (quartiles[2] - quartiles[0]) / median if median else 0.0, len(samples))

    @property
    def details(self) -> dict[str, float]:
        """For a row's details."""
        return {"spread": round(self.spread, 4), "rounds": self.rounds}


def num_sets(bench: Bench, set_bytes: int) -> int:
    """How many sets of inputs of that size to rotate among."""
    if bench.device.type != "cuda":
        return 1
    l2_bytes = torch.cuda.get_device_properties(bench.device).L2_cache_size
    return max(1, min(-(-L2_TIMES * l2_bytes // set_bytes), MAX_SETS))


def time_device(bench: Bench, calls: Sequence[Call], rounds: int = 30) -> Timing:
    """Device time of one call, each of `calls` in turn; they must not look at the host.

    They are captured into one graph, whose replays leave no gap for launches.
    """
    if bench.device.type != "cuda":
        return time_wall(bench, calls, rounds=2)
    count = max(len(calls), CALLS_PER_REPLAY)
    replay = captured(list(islice(cycle(calls), count)), warm_ups=len(calls))
    return _between_events(bench, replay, count, rounds)


def time_launched(bench: Bench, calls: Sequence[Call], rounds: int = 30) -> Timing:
    """The same without a graph, for what cannot be captured: launches count where they take longer."""
    count = max(len(calls), CALLS_PER_REPLAY)
    in_turn = list(islice(cycle(calls), count))
    return _between_events(bench, lambda: [call() for call in in_turn], count, rounds)


def _between_events(bench: Bench, run: Call, count: int, rounds: int) -> Timing:
    """`run` makes `count` calls; the rounds are queued without a pause."""
    for _ in range(2):
        run()
    event = partial(torch.cuda.Event, enable_timing=True)
    marks = [(event(), event()) for _ in range(rounds)]
    for start, end in marks:
        start.record()
        run()
        end.record()
    bench.synchronize()
    return Timing.of([start.elapsed_time(end) * 1e-3 / count for start, end in marks])


def captured(calls: Sequence[Call], warm_ups: int) -> Callable[[], None]:
    """One graph of all calls; the first so many run before, to compile and to allocate."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:warm_ups]:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return graph.replay


def time_wall(bench: Bench, calls: Sequence[Call], rounds: int, warm_ups: int = 1) -> Timing:
    """Wall time of one call, the device awaited behind each."""
    each = cycle(calls)
    for _ in range(warm_ups):
        next(each)()
    samples = []
    for _ in range(rounds):
        call = next(each)
        bench.synchronize()
        start = time.perf_counter()
        call()
        bench.synchronize()
        samples.append(time.perf_counter() - start)
    return Timing.of(samples)
