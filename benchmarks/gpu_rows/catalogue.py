"""Every row of the GPU table, the worthiest first: what does not fit into the budget is at the end."""

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.gpu_rows.row import Goal, Row

BATCHES = (1, 32, 128)
PROMPTS = {"2k": 2048, "8k": 8192}
IDLE_BATCH = 32
KERNEL_BANDWIDTH = Goal("ratio", "<=", 1 / 0.8)
"""At least 80 % of the bandwidth."""


@dataclass(frozen=True)
class Section:
    """Rows that share a process."""

    module: str
    """In this package; its `rows(bench)` gives a function for each row."""
    start_s: float
    """What it takes until the first row begins."""


SECTIONS = {
    "ceilings": Section("ceilings", 12),
    "8B": Section("steps", 25),
    "kernels": Section("kernels", 12),
    "sampler": Section("sampler", 12),
    "split": Section("split", 15),
    "1B": Section("steps", 18),
    "0.6B": Section("steps", 18),
    "transformers": Section("transformers_cb", 30),
    "flashinfer": Section("flashinfer_rows", 12),
}
"""In the order in which they run."""

DECODE_GOALS = {
    ("8B", 1): 1.25,
    ("8B", 32): 1.25,
    ("8B", 128): 1.35,
    ("1B", 1): 1.8,
    ("1B", 32): 1.5,
    ("0.6B", 1): 3.0,
    ("0.6B", 32): 1.6,
}
"""Step ÷ floor. A small model's step is made of kernel boundaries more than of bytes."""

PREFILL_GOALS = {"8B": 1.4}
IDLE_GOALS = {"8B": 2.0, "1B": 5.0}
"""Per cent of the time between two steps."""

WITHOUT = {"CUDA graphs": {"cuda_graphs": "off"}, "overlap": {"overlap": "off"}}
"""What is switched off, one at a time, to show what it gives: fields of EngineConfig."""

DRAFTS = {"8B": "1B"}
"""Draft models, by the model that they draft for."""
DRAFTED_BATCHES = (1, 32)

DECODE_KERNELS = {
    "8B, batch 32, 1k": ("8B", 32, 1024),
    "8B, batch 128, 1k": ("8B", 128, 1024),
    "8B, batch 32, 4k": ("8B", 32, 4096),
    "8B, batch 1, 8k": ("8B", 1, 8192),
    "1B, batch 32, 1k": ("1B", 32, 1024),
    "0.6B, batch 32, 1k": ("0.6B", 32, 1024),
}
"""Shape, batch, context."""

COPIES = ("gather", "scatter", "gather with checksum", "scatter with checksum")
LAYER_KERNELS = ("add_rms_norm", "silu_mul", "rope_store_kv")
DRAWS = {"greedy": None, "temperature": None, "top-k and top-p": Goal("measured", "<=", 60.0)}
PEERS = {"as it comes": 3.0, "graphs and async": 1.5}
"""Settings of transformers' continuous batching, and how many times its tokens per second are ours."""


def catalogue() -> list[Row]:
    """All of them."""
    order = list(SECTIONS)
    return sorted(_rows(), key=lambda row: order.index(row.section))


def _rows() -> Iterator[Row]:
    yield from ceilings()
    for shape in ("8B", "1B", "0.6B"):
        yield from steps(shape)
        yield from drafts(shape)
    yield from kernels()
    yield from sampler()
    yield from split()
    yield from peers()


def ceilings() -> Iterator[Row]:
    """What this GPU gives: every floor is made of these."""
    yield Row(name="read bandwidth", section="ceilings", unit="GB/s", estimate_s=4)
    yield Row(name="copy bandwidth", section="ceilings", unit="GB/s", estimate_s=2)
    yield Row(name="bf16 matrix product", section="ceilings", unit="TFLOP/s", estimate_s=3)
    yield Row(name="empty kernel in a graph", section="ceilings", unit="µs", estimate_s=2)


def steps(shape: str) -> Iterator[Row]:
    """The served step of a model of this shape with random weights."""
    for batch in BATCHES:
        limit = DECODE_GOALS.get((shape, batch))
        goal = Goal("ratio", "<=", limit) if limit else None
        yield Row(
            name=f"decode step, {shape}, batch {batch}", section=shape, unit="ms", estimate_s=5, goal=goal
        )
    for prompt in PROMPTS:
        limit = PREFILL_GOALS.get(shape)
        goal = Goal("ratio", "<=", limit) if limit else None
        yield Row(name=f"prefill, {shape}, {prompt}", section=shape, unit="ms", estimate_s=4, goal=goal)
    for name in WITHOUT:
        yield Row(
            name=f"decode step without {name}, {shape}, batch {IDLE_BATCH}", section=shape, unit="ms",
            estimate_s=6,
        )  # fmt: skip
    limit = IDLE_GOALS.get(shape)
    goal = Goal("measured", "<=", limit) if limit else None
    idle = f"GPU idle between steps, {shape}, batch {IDLE_BATCH}"
    yield Row(name=idle, section=shape, unit="%", estimate_s=6, goal=goal)


def drafts(shape: str) -> Iterator[Row]:
    """The step that drafts first, its passes started one behind the other."""
    for batch in DRAFTED_BATCHES if shape in DRAFTS else ():
        yield Row(
            name=f"decode step with drafts, {shape} and {DRAFTS[shape]}, batch {batch}", section=shape,
            unit="ms", estimate_s=10, against="passes one by one",
        )  # fmt: skip


def kernels() -> Iterator[Row]:
    """Single operators, replayed from a graph over more data than the L2 cache holds."""

    def row(name: str, goal: Goal | None = KERNEL_BANDWIDTH) -> Row:
        return Row(name=name, section="kernels", unit="µs", estimate_s=3, goal=goal)

    for name in DECODE_KERNELS:
        yield row(f"paged decode attention, {name}")
    for name in COPIES:
        yield row(f"{name} of 8k tokens, 8B")
    for name in LAYER_KERNELS:
        yield row(f"{name}, 8B, 8k rows")
    yield row("prefill attention, 8B, 8k", None)
    yield Row(
        name="paged decode attention beside flashinfer, 8B, batch 32, 1k", section="flashinfer", unit="µs",
        estimate_s=60, goal=Goal("ratio", "<=", 1.05), against="flashinfer",
    )  # fmt: skip


def sampler() -> Iterator[Row]:
    """From 32 rows of 128k logits to 32 tokens."""
    for name, goal in DRAWS.items():
        yield Row(name=f"sampler, {name}, batch 32", section="sampler", unit="µs", estimate_s=3, goal=goal)
    yield Row(
        name="sampler, top-k and top-p, batch 32, as the engine calls it", section="sampler", unit="µs",
        estimate_s=3,
    )  # fmt: skip
    yield Row(
        name="sampler beside flashinfer, top-k and top-p, batch 32", section="flashinfer", unit="µs",
        estimate_s=40, against="flashinfer",
    )  # fmt: skip


def split() -> Iterator[Row]:
    """`tandem up` with prefill and decode workers on one GPU, beside a co-located one."""

    def row(name: str, unit: str, estimate_s: float, goal: Goal, against: str) -> Row:
        return Row(name=name, section="split", unit=unit, estimate_s=estimate_s, goal=goal, against=against)

    colocated = "co-located"
    yield row("split, 8k: TTFT", "ms", 45, Goal("ratio", "<=", 1.02), colocated)
    yield row("split, 8k: first gap", "ms", 2, Goal("excess", "<=", 3.0), "co-located step")
    yield row("split, 8k: transfer hidden behind prefill", "%", 6, Goal("measured", ">=", 95.0), "floor")
    yield row("split, 512: TTFT", "ms", 10, Goal("excess", "<=", 1.5), colocated)
    yield row("split, 512: first gap", "ms", 2, Goal("excess", "<=", 3.0), "co-located step")


def peers() -> Iterator[Row]:
    """Both engines in one process, on the same prompts."""
    for name, limit in PEERS.items():
        yield Row(
            name=f"8B, batch 32: beside transformers' continuous batching, {name}", section="transformers",
            unit="tokens/s", estimate_s=30, goal=Goal("ratio", ">=", limit), against="transformers",
        )  # fmt: skip
