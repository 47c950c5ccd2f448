"""An engine on the GPU of `tests.fakes.gpu`, its kernels compiled for sm_90: `python -m … CHECKPOINT DTYPE`.

Prints what Triton compiled at the engine's start, and then, on another line, what it compiled for requests.
"""

import random
import sys

import triton

from engine.config import EngineConfig
from engine.engine import Engine
from engine.loader import load_model
from engine.request import Request, SamplingParams
from tests.fakes.gpu_runtime import gpu

KINDS = ({}, {"temperature": 0.0}, {"top_k": 7}, {"typical_p": 0.7})


def main(checkpoint, dtype):
    compiled = []
    triton.knobs.runtime.jit_cache_hook = lambda **call: compiled.append(call["fn"].name)
    with gpu(dry=True):
        config = EngineConfig(
            device="cuda:0", dtype=dtype, num_blocks=160, max_num_seqs=6, max_num_batched_tokens=100,
            cuda_graph_sizes=(4, 6), speculative="draft", draft_model=checkpoint, num_draft_tokens=3,
            draft_acceptance="rejection",
        )  # fmt: skip
        engine = Engine(config, load_model(checkpoint, config))
        print(*sorted(set(compiled)))
        compiled.clear()
        run(engine)
        print(*compiled)


def run(engine):
    rng = random.Random(0)
    for key in range(16):
        prompt = [rng.randrange(3, 2000) for _ in range(rng.choice((1, 2, 7, 9, 20, 64, 300)))]
        sampling = SamplingParams(max_tokens=rng.randrange(1, 7), ignore_eos=True, **rng.choice(KINDS))
        engine.submit(Request(key=key, prompt_token_ids=prompt, sampling=sampling))
        if engine.has_work():
            engine.step()
    while engine.has_work():
        engine.step()


if __name__ == "__main__":
    from pathlib import Path

    main(Path(sys.argv[1]), sys.argv[2])
