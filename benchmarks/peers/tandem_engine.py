"""Tandem's engine in one process, prefill and decode co-located."""

from pathlib import Path

import torch

from benchmarks.peers import arm
from engine.config import EngineConfig
from engine.engine import Engine
from engine.loader import LoadedModel, load_model
from engine.request import Request, SamplingParams


def prepare(job: arm.Job):
    """See arm.serve."""
    torch.set_num_threads(job.threads)
    config = EngineConfig(
        dtype=job.dtype, max_num_batched_tokens=job.max_num_batched_tokens, prefix_cache=False
    )
    model = load_model(Path(job.model), config)
    return lambda job: run(config, model, job)


def run(config: EngineConfig, model: LoadedModel, job: arm.Job) -> arm.Round:
    """All requests at once, step by step."""
    engine = Engine(config, model)
    recorder = arm.Recorder(len(job.prompts))
    before = arm.own_cpu_s()
    for index, (prompt, num_tokens) in enumerate(zip(job.prompts, job.output_lens, strict=True)):
        sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        engine.submit(Request(key=index, prompt_token_ids=list(prompt), sampling=sampling))
    while engine.has_work():
        for output in engine.step().outputs:
            recorder.tokens(output.request.key, list(output.token_ids))
    return recorder.finish(arm.own_cpu_s() - before)


if __name__ == "__main__":
    arm.serve(prepare, ("torch",))
