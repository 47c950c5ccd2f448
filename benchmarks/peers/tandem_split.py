"""`tandem up` with one prefill and one decode worker, over gRPC; the client's CPU time is not counted."""

import asyncio
import atexit

import psutil

import tandem
from benchmarks.peers import arm
from tests.e2e.harness import Up


def prepare(job: arm.Job):
    """See arm.serve. Each of the two workers has one thread, whatever the job allows to one process."""
    up = Up(
        f"--model={job.model}",
        f"--dtype={job.dtype}",
        f"--max-num-batched-tokens={job.max_num_batched_tokens}",
        "--threads=1",
        "--no-prefix-cache",
    )
    atexit.register(up.stop)
    return lambda job: asyncio.run(run(up, job))


async def run(up: Up, job: arm.Job) -> arm.Round:
    """All requests at once, each a stream of its own."""
    recorder = arm.Recorder(len(job.prompts))
    before = cpu_s(up)
    async with tandem.Client(up.grpc) as client, asyncio.TaskGroup() as tasks:
        for index, (prompt, num_tokens) in enumerate(zip(job.prompts, job.output_lens, strict=True)):
            tasks.create_task(stream(client, recorder, index, prompt, num_tokens))
    return recorder.finish(cpu_s(up) - before)


async def stream(
    client: tandem.Client, recorder: arm.Recorder, index: int, prompt: list[int], num_tokens: int
) -> None:
    """One request from prompt to last token."""
    async for delta in client.generate(prompt, max_tokens=num_tokens, temperature=0.0, ignore_eos=True):
        recorder.tokens(index, list(delta.token_ids))


def cpu_s(up: Up) -> float:
    """User and system time of the launcher and all that it started."""
    root = psutil.Process(up.process.pid)
    times = [process.cpu_times() for process in (root, *root.children(recursive=True))]
    return sum(each.user + each.system for each in times)


if __name__ == "__main__":
    arm.serve(prepare, ("torch", "grpcio"))
