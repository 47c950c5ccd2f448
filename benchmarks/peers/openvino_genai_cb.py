"""openvino-genai's ContinuousBatchingPipeline: paged KV, chunked prefill, token ids in and out."""

import arm
import openvino as ov
import openvino_genai as genai

PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}
CACHE_GIB = 1


def prepare(job: arm.Job):
    """See arm.serve."""
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = CACHE_GIB
    scheduler.max_num_batched_tokens = job.max_num_batched_tokens
    scheduler.max_num_seqs = 256
    scheduler.dynamic_split_fuse = True
    scheduler.enable_prefix_caching = False
    precision = PRECISIONS[job.dtype]
    properties = {
        "INFERENCE_PRECISION_HINT": precision,
        "KV_CACHE_PRECISION": precision,
        "INFERENCE_NUM_THREADS": job.threads,
    }
    pipeline = genai.ContinuousBatchingPipeline(job.peer_model, scheduler, "CPU", properties, {}, {})
    return lambda job: run(pipeline, job)


def run(pipeline: genai.ContinuousBatchingPipeline, job: arm.Job) -> arm.Round:
    """All requests at once, step by step."""
    recorder = arm.Recorder(len(job.prompts))
    before = arm.own_cpu_s()
    handles = [
        pipeline.add_request(index, ov.Tensor([prompt]), generation_config(num_tokens))
        for index, (prompt, num_tokens) in enumerate(zip(job.prompts, job.output_lens, strict=True))
    ]
    while pipeline.has_non_finished_requests():
        pipeline.step()
        for index, handle in enumerate(handles):
            while handle.can_read():
                for output in handle.read().values():
                    recorder.tokens(index, list(output.generated_ids))
    return recorder.finish(arm.own_cpu_s() - before)


def generation_config(num_tokens: int) -> genai.GenerationConfig:
    """Greedy, exactly this many tokens."""
    config = genai.GenerationConfig()
    config.max_new_tokens = num_tokens
    config.ignore_eos = True
    config.do_sample = False
    return config


if __name__ == "__main__":
    arm.serve(prepare, ("openvino", "openvino-genai"))
