"""From logits to tokens."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import cycle

import torch
from torch import Tensor

from benchmarks.gpu_rows.bench import Bench, RowFunctions
from benchmarks.gpu_rows.kernels import against_bytes
from benchmarks.gpu_rows.row import Measured
from benchmarks.gpu_rows.serving import make_request
from benchmarks.gpu_rows.timing import Call, num_sets, time_device, time_wall
from engine.sampler import Sampler
from kernels import ops
from kernels.truncation import Truncation

BATCH = 32
TEMPERATURE, TOP_K, TOP_P = 0.8, 50, 0.95


class Logits:
    """Several sets of one step's logits, and what tokens are drawn with."""

    def __init__(self, bench: Bench) -> None:
        self.batch, vocab = bench.pick(BATCH, 2), bench.shape("8B").vocab
        count = num_sets(bench, self.batch * vocab * 4)
        self.sets: list[Tensor] = [
            torch.randn(self.batch, vocab, device=bench.device) * 3 for _ in range(count)
        ]
        self.keys = [torch.arange(self.batch, device=bench.device) for _ in range(3)]

    @property
    def num_bytes(self) -> int:
        """Of one set."""
        return self.sets[0].nbytes

    def truncation(self, temperature: float, top_k: int, top_p: float) -> Truncation:
        """The same for every row."""
        device = self.sets[0].device
        float32, int32 = partial(_full, self.batch, device, torch.float32), torch.int32
        return Truncation(
            float32(temperature), _full(self.batch, device, int32, top_k), float32(top_p), float32(0.0)
        )

    def draws(self, truncation: Truncation) -> list[Call]:
        """The operator over each of the sets."""
        return [partial(ops.draw, logits, truncation, *self.keys) for logits in self.sets]


def _full(count: int, device: torch.device, dtype: torch.dtype, value: float) -> Tensor:
    return torch.full((count,), value, dtype=dtype, device=device)


def rows(bench: Bench) -> RowFunctions:
    """See catalogue.sampler; a draw must read the logits once."""

    def drawn(*parameters: float) -> Callable[[], Measured]:
        def measure() -> Measured:
            logits = Logits(bench)
            truncation = logits.truncation(parameters[0], int(parameters[1]), parameters[2])
            timing = time_device(bench, logits.draws(truncation))
            return against_bytes(bench, timing, read=logits.num_bytes)

        return measure

    truncated = "top-k and top-p, batch 32"
    return {
        "sampler, greedy, batch 32": drawn(0.0, 0, 1.0),
        "sampler, temperature, batch 32": drawn(1.0, 0, 1.0),
        f"sampler, {truncated}": drawn(TEMPERATURE, TOP_K, TOP_P),
        f"sampler, {truncated}, as the engine calls it": partial(as_served, bench),
    }


def as_served(bench: Bench) -> Measured:
    """`Sampler.sample` by the wall: with its host work, until the tokens are known."""
    logits = Logits(bench)
    sampler = Sampler((), logits.sets[0].shape[1])
    requests = [make_request(logits.sets[0].shape[1], 8, 8) for _ in range(logits.batch)]
    for request in requests:
        request.sampling = replace(request.sampling, temperature=TEMPERATURE, top_k=TOP_K, top_p=TOP_P)
    sets = cycle(logits.sets)
    timing = time_wall(
        bench, [lambda: sampler.sample(next(sets), requests)], rounds=bench.pick(50, 3), warm_ups=5
    )
    return against_bytes(bench, timing, read=logits.num_bytes)
