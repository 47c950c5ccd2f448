"""A gateway whose memory is almost full refuses before the kernel kills it."""

import os
import subprocess
import sys
from pathlib import Path

import grpc.aio
import httpx
import pytest

from protos.tandem.v1 import inference_pb2, inference_pb2_grpc
from runtime.errors import Overloaded
from tests.e2e.harness import eventually
from tests.fakes.cluster import cluster, http
from tests.faults import cgroups

BODY = {"prompt": [3, 4, 5], "max_tokens": 2, "model": "demo"}


async def test_new_requests_are_refused_with_a_hint_and_served_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async with cluster(("decode", "decode-0")) as made, http(made) as client:

        def full() -> None:
            raise Overloaded("memory is almost full; try again", retry_after_s=1.0, retryable=True)

        with monkeypatch.context() as patch:
            patch.setattr(made.gateway.flow, "_check_memory", full)
            refused = await client.post("/v1/completions", json=BODY)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            async with grpc.aio.insecure_channel(made.grpc) as channel:
                call = inference_pb2_grpc.InferenceServiceStub(channel).Complete(
                    inference_pb2.CompleteRequest(token_ids=inference_pb2.TokenIds(ids=[3]))
                )
                assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await client.post("/v1/completions", json=BODY)).status_code == 200
        await made.quiet()


@pytest.mark.long
@pytest.mark.skipif(not cgroups.has_memory_limit(), reason="no memory limit by cgroups v1 that we may use")
def test_a_real_limit_is_seen_before_it_is_met() -> None:
    folder = cgroups.V1_MEMORY / f"tandem-guard-{os.getpid()}"
    folder.mkdir()
    enter = f'echo $$ > {folder}/cgroup.procs; exec "$0" -m gateway --http-port=0 --grpc-port=0'
    process = subprocess.Popen(["sh", "-c", enter, sys.executable], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[1].removeprefix("http=")
        with httpx.Client(base_url=url, trust_env=False) as client:

            def status() -> int:
                return client.post("/v1/completions", json=BODY | {"model": "demo_model"}).status_code

            assert status() == 503  # no worker is there
            _limit(folder, used_share=0.97)
            eventually(lambda: status() == 429, 5, "a refusal")
            _limit(folder, used_share=0.5)
            eventually(lambda: status() == 503, 5, "no refusal")
            assert process.poll() is None
    finally:
        process.kill()
        process.communicate()
        eventually(lambda: not (folder / "cgroup.procs").read_text(), 10, "an empty group")
        folder.rmdir()


def _limit(folder: Path, *, used_share: float) -> None:
    """A limit of which what is used, but for pages of files, is such a share."""
    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    used = (
        int((folder / "memory.usage_in_bytes").read_text())
        - int(stat["total_inactive_file"])
        - int(stat["total_active_file"])
    )
    cgroups.limit_memory(folder, int(used / used_share))
