"""What the operator sets for one engine."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from engine.policy import PolicyName
from engine.preemption import PreemptionChoice
from engine.step.shapes import MAX_STEP_ROWS

DType = Literal["auto", "float32", "bfloat16", "float16"]
Speculative = Literal["off", "ngram", "draft"]
DraftAcceptance = Literal["coupled", "rejection"]
CudaGraphs = Literal["auto", "off"]
Overlap = Literal["auto", "on", "off"]

MAX_DRAFT_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Sizes and limits of one engine; ValueError names the rule that a value breaks."""

    block_size: int = 16
    """Token slots of a block."""
    num_blocks: int | None = None
    """Blocks of the pool; None: as many as fit into `kv_cache_memory_bytes`."""
    kv_cache_memory_bytes: int | None = None
    """Memory of the KV pool, all groups and ranks together; None: 1 GiB on a CPU, on a GPU what is free."""
    gpu_memory_utilization: float = 0.9
    """Of a GPU's memory that is free beside weights and steps, the share that the KV pool gets."""
    max_model_len: int | None = None
    """Most tokens of a sequence, prompt and output; None: what the checkpoint allows."""
    max_num_seqs: int = 256
    """Most requests that decode, are prefilled or are reserved at a time."""
    max_num_batched_tokens: int = 512
    """Most tokens of a step; longer prompts are computed in chunks."""
    prefix_cache: bool = True
    """Keep full blocks after their requests, and share them among requests that start alike."""
    scheduling_policy: PolicyName = "fcfs"
    """Who goes first, and who makes room when blocks run out."""
    preemption_mode: PreemptionChoice = "auto"
    """What becomes of a running request whose blocks are taken."""
    swap_space_bytes: int = 1 << 30
    """Host memory for the KV of preempted requests; 0: none."""
    speculative: Speculative = "off"
    """Who guesses the next tokens: nobody, the sequence itself, or a draft model."""
    draft_model: Path | None = None
    """Checkpoint of the draft model, which has the target's vocabulary."""
    num_draft_tokens: int | None = None
    """Draft tokens per request and step; None: as many as pay, by acceptance rate and measured cost."""
    draft_acceptance: DraftAcceptance = "coupled"
    """"coupled": token by token the output without speculation. "rejection": exact in distribution only."""
    dtype: DType = "auto"
    """Of weights and KV. "auto": the checkpoint's on a GPU, float32 on a CPU, where exactness is defined."""
    cuda_graphs: CudaGraphs = "auto"
    """"auto": on a GPU decode steps, on every rank, and passes of a draft model that overlap, are captured at
    the start and replayed."""
    cuda_graph_sizes: tuple[int, ...] = ()
    """Numbers of requests that captured steps are padded to; empty: `engine.step.shapes.usual_sizes`."""
    overlap: Overlap = "auto"
    """Start a decode step before the one before it has ended; never with speculation. With a draft model its
    passes start so, and are waited for once. "auto": on a GPU."""
    layer_stream_threshold: int = 0
    """Chunks of at least so many prompt tokens are told of layer by layer (engine.layer_watch); 0: none."""
    linked_memory_bytes: int = 0
    """Of a GPU's memory, what others in this process will take: the KV pool leaves it free."""
    device: str = "cpu"
    """A torch device, for example "cpu" or "cuda:0"."""

    def __post_init__(self) -> None:
        for field in ("block_size", "max_num_seqs", "max_num_batched_tokens"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        for field in ("num_blocks", "kv_cache_memory_bytes", "max_model_len"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{field} must be at least 1 or unset, got {value}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(f"gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization}")
        for field in ("swap_space_bytes", "layer_stream_threshold", "linked_memory_bytes"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} must be at least 0, got {getattr(self, field)}")
        if self.num_draft_tokens is not None and not 0 <= self.num_draft_tokens <= MAX_DRAFT_TOKENS:
            raise ValueError(
                f"num_draft_tokens must be in [0, {MAX_DRAFT_TOKENS}], got {self.num_draft_tokens}"
            )
        for size in self.cuda_graph_sizes:
            if not 1 <= size <= MAX_STEP_ROWS:
                raise ValueError(f"cuda_graph_sizes must be in [1, {MAX_STEP_ROWS}], got {size}")
        if (self.speculative == "draft") != (self.draft_model is not None):
            raise ValueError("speculative draft and a draft_model go together")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, got {self.dtype!r}")


def usual_layer_stream_threshold(device: str) -> int:
    """Tokens of a chunk whose KV leaves layer group by layer group unless the operator names a number.

    On a CPU never: chunks hide all but 1.5 % of a transfer's time, and frames and scatters take the cores
    that compute. On a GPU a chunk of 256 tokens of an 8B model has 32 MiB of KV, one frame of a link: what
    is smaller is not worth cutting.
    """
    return 0 if torch.device(device).type == "cpu" else 256


def usual_batched_tokens(device: str) -> int:
    """Tokens of a step unless the operator names a number.

    More than 512 do not compute faster on a CPU, they only let others wait. A GPU needs some 200 to be busy
    with a step; 2048 are far above that, stop decoding requests for tens of milliseconds, not hundreds, and
    leave a quarter of what 8192 would for the end of a KV transfer that nothing hides.
    """
    return 512 if torch.device(device).type == "cpu" else 2048
