"""transformers' continuous batching: the manager's own loop, paged KV, sdpa attention."""

import arm
import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation import ContinuousBatchingConfig

BLOCK_SIZE = 32


def prepare(job: arm.Job):
    """See arm.serve."""
    torch.set_num_threads(job.threads)
    model = AutoModelForCausalLM.from_pretrained(
        job.model, dtype=getattr(torch, job.dtype), attn_implementation="sdpa"
    ).eval()
    return lambda job: run(model, job)


def run(model, job: arm.Job) -> arm.Round:
    """All requests at once; one background thread of the manager computes."""
    total = sum(len(p) + n + BLOCK_SIZE for p, n in zip(job.prompts, job.output_lens, strict=True))
    batching = ContinuousBatchingConfig(
        page_size=BLOCK_SIZE,
        num_blocks=total // BLOCK_SIZE + 1,
        max_batch_tokens=job.max_num_batched_tokens,
    )
    config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=1)
    recorder = arm.Recorder(len(job.prompts))
    before = arm.own_cpu_s()
    with model.continuous_batching_context_manager(
        generation_config=config, continuous_batching_config=batching
    ) as manager:
        ids = {
            manager.add_request(prompt, max_new_tokens=num_tokens, streaming=True): index
            for index, (prompt, num_tokens) in enumerate(zip(job.prompts, job.output_lens, strict=True))
        }
        collect(manager, ids, recorder)
    return recorder.finish(arm.own_cpu_s() - before)


def collect(manager, ids: dict[str, int], recorder: arm.Recorder) -> None:
    """Read outputs until every request is finished."""
    unfinished = set(ids)
    while unfinished:
        output = manager.get_result(timeout=1)
        if output is None:
            assert manager.is_running(), "the manager died"
            continue
        index = ids[output.request_id]
        seen = len(recorder.round.outputs[index])
        recorder.tokens(index, output.generated_tokens[seen:])
        if output.is_finished():
            unfinished.discard(output.request_id)


if __name__ == "__main__":
    arm.serve(prepare, ("torch", "transformers"))
