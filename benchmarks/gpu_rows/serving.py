"""Engines over random models, and requests that decode without a prefill having been paid for."""

import itertools
import random
from collections.abc import Sequence

from benchmarks.gpu_rows.bench import Bench
from benchmarks.gpu_rows.models import RandomModel
from engine.config import EngineConfig
from engine.engine import Engine
from engine.request import Request, RequestState, SamplingParams
from engine.sampler import Sample

BLOCK_SIZE = 16
ROOM = 256
"""Tokens that a request can grow by."""

_keys = itertools.count()


def engine_config(bench: Bench, *, max_model_len: int, batches: tuple[int, ...], tokens: int) -> EngineConfig:
    """As a worker has it, with a pool for `tokens` tokens and captured steps for these batches."""
    return EngineConfig(
        device=str(bench.device),
        dtype="bfloat16" if bench.device.type == "cuda" else "float32",
        block_size=BLOCK_SIZE,
        num_blocks=max(tokens, max_model_len) // BLOCK_SIZE + max(batches) + 1,
        max_model_len=max_model_len,
        max_num_seqs=max(batches),
        max_num_batched_tokens=bench.pick(8192, 256),
        preemption_mode="recompute",
        swap_space_bytes=0,
        cuda_graph_sizes=batches,
        overlap="on",
    )


def make_engine(model: RandomModel, config: EngineConfig) -> Engine:
    """Its pool holds noise: keys that were never written could be anything, NaN too."""
    engine = Engine(config, model.loaded)
    for group in engine.kv_cache.groups:
        group.normal_()
    return engine


def make_request(vocab_size: int, prompt_len: int, max_tokens: int, *, prefill_only: bool = False) -> Request:
    """Greedy, with random tokens that no other request has."""
    key = next(_keys)
    rng = random.Random(key)
    return Request(
        key=key,
        prompt_token_ids=[rng.randrange(3, vocab_size) for _ in range(prompt_len)],
        sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
        prefill_only=prefill_only,
    )


def start_decoding(engine: Engine, batch: int, context_len: int) -> list[Request]:
    """Requests whose KV came from elsewhere, as on a decode worker."""
    requests = [make_request(engine.facts.vocab_size, context_len, ROOM) for _ in range(batch)]
    for request in requests:
        engine.enter(request)
        if not engine.reserve(request):
            raise RuntimeError(f"the pool has no room for {batch} requests of {context_len} tokens")
        engine.commit_choices(request, {0: Sample(3)}, num_groups=len(engine.kv_cache.groups))
    return requests


def stop_decoding(engine: Engine, requests: Sequence[Request]) -> None:
    """Forget them; the step that is on its way still has their blocks."""
    for request in requests:
        engine.abort(request.key)
    while engine.has_work():
        engine.step()


def prefill(engine: Engine, request: Request) -> None:
    """One prompt from its first chunk to its first token, as on a prefill worker."""
    engine.submit(request)
    while request.state is not RequestState.HELD:
        engine.step()
    engine.release(request.key)
