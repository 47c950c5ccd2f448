"""The engine on the GPU of `tests.fakes.gpu`: kernels in Triton's interpreter, graphs on a tape."""

import os
import random
import subprocess
import sys
from contextlib import nullcontext
from unittest import mock

import pytest
import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.loader import load_model
from engine.request import Request, RequestState, SamplingParams
from kernels import ops
from kernels.triton_launch import INTERPRETED
from tests.fakes.gpu import ROOT, IllegalInCapture, MixedDevices
from tests.fakes.gpu_runtime import gpu
from tests.unit.engine.conftest import write_checkpoint

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="there is a real one")

SIZE = {"num_blocks": 40, "block_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": 12}
DRAWN_ON_DEVICE = ({}, {"temperature": 0.0}, {"top_k": 7, "top_p": 0.9})
JUDGED_ON_HOST = (
    {"typical_p": 0.7, "logprobs": 2},
    {"presence_penalty": 0.8, "logit_bias": {5: 2.0}, "min_tokens": 3, "bad_words": ((7,), (5, 6))},
    {"allowed_token_ids": tuple(range(4, 12)), "prompt_logprobs": 1},
)
EAGER_DECODE = {
    ("upload", "kernels/integers.py:int64s"): 1,  # token ids, positions and slots; all rows are final
    ("upload", "kernels/attention.py:paged"): 3,  # queries, contexts, block tables
    ("upload", "engine/drawing.py:_columns"): 1,
    ("upload", "engine/drawing.py:draw_fused"): 1,
    ("download", "engine/sampler.py:sample"): 1,
}
"""All that the host waits for in a decode step that runs kernel by kernel."""


def requests(kinds, max_tokens=3):
    return [
        Request(
            key=row,
            prompt_token_ids=[3 + (7 * row + 5 * i) % 50 for i in range((11, 9, 2, 4)[row % 4])],
            sampling=SamplingParams(
                **{"max_tokens": max_tokens, "temperature": 0.9, "seed": row, "ignore_eos": True, **kind}
            ),
        )
        for row, kind in enumerate(kinds)
    ]


def engine_on(device, path, *, warmed_up=False, **settings):
    config = EngineConfig(**{**SIZE, "device": device, **settings})
    with nullcontext() if warmed_up else mock.patch("engine.runner.warm_up"):
        return Engine(config, load_model(path, config))


def run(engine, *wanted):
    for request in wanted:
        engine.submit(request)
    while engine.has_work():
        engine.step()
    return [request.output_token_ids for request in wanted]


def on_both(path, kinds, **settings):
    """The tokens from a CPU and from the device, and the device."""
    expected = run(engine_on("cpu", path, **settings), *requests(kinds))
    with gpu() as device:
        return expected, run(engine_on("cuda:0", path, **settings), *requests(kinds)), device


def test_captured_and_overlapped_steps(checkpoint):
    expected, found, device = on_both(checkpoint, DRAWN_ON_DEVICE, cuda_graph_sizes=(4,))
    assert found == expected
    assert set(device.launches) >= {"decode_kernel", "prefill_kernel", "rope_store_kernel", "draw_kernel"}


def test_captured_steps_that_are_judged_on_the_host(draft_checkpoint):
    expected, found, _ = on_both(draft_checkpoint, JUDGED_ON_HOST, cuda_graph_sizes=(4,))
    assert found == expected


def test_verification_by_rejection(checkpoint, draft_checkpoint):
    settings = {
        "speculative": "draft",
        "draft_model": draft_checkpoint,
        "num_draft_tokens": 2,
        "cuda_graph_sizes": (4,),
    }
    expected, found, device = on_both(
        checkpoint, [{}, {"top_k": 5}], draft_acceptance="rejection", cuda_graphs="off", **settings
    )
    assert found == expected
    assert device.launches["judge_kernel"]


def test_what_an_eager_decode_step_waits_for(draft_checkpoint):
    with gpu() as device:
        engine = engine_on("cuda:0", draft_checkpoint, cuda_graphs="off", overlap="off")
        for request in (wanted := requests([{}] * 4, max_tokens=9)):
            engine.submit(request)
        while not all(request.state is RequestState.RUNNING for request in wanted):
            engine.step()
        device.waits.clear()
        engine.step()
        assert device.waits == EAGER_DECODE


def test_blocks_go_to_slabs_and_to_the_host_and_back(draft_checkpoint):
    with gpu():
        engine = engine_on("cuda:0", draft_checkpoint, cuda_graphs="off", swap_space_bytes=1 << 16)
        pool = engine.kv_cache.pool
        pool.groups[0].normal_()
        group = pool.groups[0].host
        for device in ("cuda:0", "cpu"):
            slab = torch.zeros(1 << 12, dtype=torch.uint8, device=device)
            checksum = pool.gather(0, [3, 1, 5], 0, 1, slab)
            assert pool.scatter(0, [7, 9, 8], 0, 1, slab) == checksum
            assert torch.equal(group[:, :, [3, 1, 5]], group[:, :, [7, 9, 8]])
        pool.store([[3, 1]], [1, 0])
        pool.load([0, 1], [[10, 11]])
        pool.copy(0, [1, 3], [12, 13])
        assert torch.equal(group[:, :, [1, 3]], group[:, :, [10, 11]])
        assert torch.equal(group[:, :, [1, 3]], group[:, :, [12, 13]])


def test_some_of_the_heads_go_to_slabs_and_back(checkpoint):
    with gpu():
        pool = engine_on("cuda:0", checkpoint, cuda_graphs="off").kv_cache.pool.local
        pool.groups[0].normal_()
        group = pool.groups[0].host
        for device in ("cuda:0", "cpu"):
            slab = torch.zeros(1 << 12, dtype=torch.uint8, device=device)
            checksum = pool.gather(0, [2, 4], 1, 1, slab, range(1, 2))
            assert pool.scatter(0, [6, 0], 1, 1, slab, range(1, 2)) == checksum
            assert torch.equal(group[1:, :, [2, 4], :, 1:], group[1:, :, [6, 0], :, 1:])
            assert not torch.equal(group[1:, :, [2, 4], :, :1], group[1:, :, [6, 0], :, :1])
            group[1:, :, [6, 0]] = 0


def test_blocks_of_float8_are_copied_as_bytes():
    with gpu():
        group = torch.randn(1, 2, 5, 4, 2, 8).to(torch.float8_e4m3fn).to("cuda:0")
        ops.copy_blocks(group, [0, 1], [3, 4])
        host = group.host.view(torch.uint8)
        assert torch.equal(host[:, :, [0, 1]], host[:, :, [3, 4]])


def test_the_pool_gets_what_the_largest_step_leaves(draft_checkpoint):
    with gpu() as device:
        engine = engine_on("cuda:0", draft_checkpoint, num_blocks=None, cuda_graphs="off", overlap="off")
        assert engine.kv_cache.groups[0].nbytes > 30 << 20
        assert device.launches["truncate_kernel"]


def test_the_device_has_the_rules_of_a_gpu():
    with gpu() as device:
        x = torch.zeros(3, device="cuda:0")
        with pytest.raises(MixedDevices):
            x + torch.ones(3)
        assert x.amax().item() == 0
        with pytest.raises(IllegalInCapture), torch.cuda.graph(torch.cuda.CUDAGraph()):
            x.tolist()
        device.capture = None
        host = torch.zeros(3, pin_memory=True)
        host.copy_(x, non_blocking=True)
        assert host.isnan().all()
        torch.cuda.synchronize()
        assert not host.any()
        x.copy_(host, non_blocking=True)
        host.fill_(1)
        with pytest.raises(AssertionError, match="too early"):
            x.tolist()
        assert torch.empty(3, device="cuda:0").isnan().all()


COMPILED = {
    "decode worker": {"cuda_graph_sizes": (4, 6)},
    "without graphs": {"cuda_graphs": "off", "cuda_graph_sizes": (4, 6)},
    "prefill worker": {"cuda_graphs": "off", "overlap": "off"},
    "draft": {"cuda_graph_sizes": (6,), "num_draft_tokens": 3},
    "rejection": {"cuda_graph_sizes": (6,), "draft_acceptance": "rejection"},
}


@pytest.fixture(scope="module")
def long_checkpoint(tmp_path_factory):
    """With contexts that attention cuts, and a vocabulary that is drawn from in parts."""
    return write_checkpoint(tmp_path_factory.mktemp("long"), max_position_embeddings=2048, vocab_size=3000)


def busy(engine, *, prefill_only):
    """Requests of many lengths and kinds that come and go."""
    rng = random.Random(0)
    for key in range(24):
        kind = rng.choice((*DRAWN_ON_DEVICE, *DRAWN_ON_DEVICE, {"typical_p": 0.7}))
        prompt = [rng.randrange(3, 2000) for _ in range(rng.choice((1, 2, 7, 8, 9, 20, 33, 64, 200, 600)))]
        sampling = SamplingParams(**{"max_tokens": rng.randrange(1, 9), "ignore_eos": True, **kind})
        engine.submit(Request(key=key, prompt_token_ids=prompt, sampling=sampling, prefill_only=prefill_only))
        step(engine, rng.randrange(3))
    while engine.has_work():
        step(engine)


def step(engine, num_steps=1):
    for _ in range(num_steps if engine.has_work() else 0):
        for output in engine.step().outputs:
            if output.request.state is RequestState.HELD:
                engine.release(output.request.key)


@pytest.mark.parametrize("name", COMPILED)
def test_no_kernel_is_compiled_while_requests_wait(long_checkpoint, name):
    settings = {**SIZE, "num_blocks": 640, "max_num_seqs": 6, "max_num_batched_tokens": 100, **COMPILED[name]}
    if name in ("draft", "rejection"):
        settings |= {"speculative": "draft", "draft_model": long_checkpoint}
    with gpu(dry=True) as device:
        engine = engine_on("cuda:0", long_checkpoint, warmed_up=True, **settings)
        compiled = set(device.variants)
        busy(engine, prefill_only=name == "prefill worker")
        assert device.variants <= compiled


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_kernel_that_an_engine_launches_compiles_at_its_start(tmp_path, dtype):
    checkpoint = write_checkpoint(
        tmp_path / "wide", max_position_embeddings=1024, vocab_size=3000, hidden_size=256, head_dim=64
    )
    command = [sys.executable, "-m", "tests.unit.engine.compiled_start", str(checkpoint), dtype]
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment)
    at_start, for_requests = done.stdout.splitlines()
    kernels = {name.rpartition(".")[2] for name in at_start.split()}
    assert kernels >= {"decode_kernel", "combine_kernel", "prefill_kernel", "judge_kernel", "draw_kernel"}
    assert for_requests == ""
