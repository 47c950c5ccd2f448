"""The size of a GPU's KV pool, from numbers that a GPU would give."""

import os
from dataclasses import replace

import pytest
import torch

from engine.config import EngineConfig, usual_batched_tokens
from engine.device_memory import free_bytes
from engine.engine import Engine
from engine.loader import load_model
from engine.memory import DeviceMemory, kv_cache_bytes, profile, with_kv_memory
from engine.parallel import follower
from engine.speculative.factory import draft_shapes
from tests.unit.engine.parallel_ranks import parallel_model

GIB = 1 << 30


def test_the_pool_gets_its_share_of_what_weights_and_steps_leave():
    memory = DeviceMemory(free_bytes=100 * GIB, step_bytes=5 * GIB)
    assert kv_cache_bytes(memory, utilization=0.5, captured=False) == 95 * GIB // 2
    assert kv_cache_bytes(memory, utilization=1.0, captured=True) == 90 * GIB
    assert kv_cache_bytes(memory, utilization=0.5, captured=False, linked_bytes=GIB) == 47 * GIB


def test_a_gpu_that_is_full_has_none():
    assert kv_cache_bytes(DeviceMemory(free_bytes=GIB, step_bytes=GIB), utilization=0.9, captured=True) == 0


class FakeMeter:
    """A device with so much free memory; remembers what it was asked to measure."""

    def __init__(self, free_bytes):
        self._free_bytes = free_bytes
        self.num_runs = 0

    def peak_bytes(self, run):
        run()
        self.num_runs += 1
        return 1000

    def free_bytes(self):
        return self._free_bytes


def counting(method, rows):
    def call(x, *args):
        rows.append(len(x))
        return method(x, *args)

    return call


def count_rows(module, monkeypatch, rows):
    for name in ("forward", "logits"):
        monkeypatch.setattr(module, name, counting(getattr(module, name), rows))


def test_the_largest_step_is_profiled(tiny_model, monkeypatch):
    rows = []
    count_rows(tiny_model.module, monkeypatch, rows)
    config = EngineConfig(max_num_batched_tokens=250, max_num_seqs=20, block_size=4)
    memory = profile(config, tiny_model, FakeMeter(5000))
    assert rows == [250, 20]
    assert memory == DeviceMemory(free_bytes=5000, step_bytes=1000)


def test_the_largest_step_is_the_drafts_too(drafted_model, monkeypatch):
    """What the target may sample is more rows than any step of the draft has."""
    rows, draft_rows = [], []
    count_rows(drafted_model.module, monkeypatch, rows)
    count_rows(drafted_model.draft.module, monkeypatch, draft_rows)
    config = EngineConfig(
        max_num_batched_tokens=250, max_num_seqs=20, block_size=4, speculative="draft",
        draft_model=drafted_model.draft.path, num_draft_tokens=1,
    )  # fmt: skip
    profile(config, drafted_model, FakeMeter(5000))
    assert (rows, draft_rows) == ([250, 40], [250])
    assert draft_shapes(config).max_num_rows <= 40


def test_what_the_operator_names_is_not_measured(tiny_model):
    for config in (EngineConfig(num_blocks=9), EngineConfig(kv_cache_memory_bytes=9)):
        meter = FakeMeter(5000)
        assert with_kv_memory(config, tiny_model, meter) is config
        assert not meter.num_runs


def test_what_is_measured_becomes_the_pools_memory(tiny_model):
    config = EngineConfig(max_num_batched_tokens=8, gpu_memory_utilization=0.5)
    assert (
        with_kv_memory(config, tiny_model, FakeMeter(1 << 20)).kv_cache_memory_bytes
        == ((1 << 20) - 1000) // 2
    )
    assert with_kv_memory(config, tiny_model) is config, "a CPU is not measured"
    linked = replace(config, linked_memory_bytes=1 << 19)
    assert (
        with_kv_memory(linked, tiny_model, FakeMeter(1 << 20)).kv_cache_memory_bytes
        == ((1 << 19) - 1000) // 2
    )


def test_ranks_are_profiled_together_and_serve_afterwards(checkpoint, make_engine, make_request, tmp_path):
    """Followers change from the profile's pool to the real one."""
    config = EngineConfig(max_num_batched_tokens=32, block_size=4, gpu_memory_utilization=1.0)
    with parallel_model(checkpoint, config, 2, tmp_path / "ranks") as model:
        measured = with_kv_memory(config, model, FakeMeter(1_001_000))
        assert measured.kv_cache_memory_bytes == 2 * 1_000_000
        engine = Engine(measured, model)
        request = make_request(17, temperature=0.0)
        engine.submit(request)
        while engine.has_work():
            engine.step()
    assert [request.output_token_ids] == make_engine().run(make_request(17, temperature=0.0))


def test_the_device_with_the_least_memory_counts_for_all(checkpoint, tmp_path, monkeypatch):
    config = EngineConfig(max_num_batched_tokens=32, block_size=4, gpu_memory_utilization=1.0)
    monkeypatch.setattr(follower, "free_bytes", lambda device: 501_000)
    with parallel_model(checkpoint, config, 4, tmp_path / "ranks") as model:
        measured = with_kv_memory(config, model, FakeMeter(1_001_000))
        assert measured.kv_cache_memory_bytes == 4 * 500_000


def test_what_is_free_on_a_cpu_is_the_hosts():
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < free_bytes(torch.device("cpu")) <= total


@pytest.mark.parametrize("value", [0.0, -1.0, 1.1])
def test_a_share_is_a_share(value):
    with pytest.raises(ValueError, match="gpu_memory_utilization"):
        EngineConfig(gpu_memory_utilization=value)


def test_the_token_budget_follows_the_device():
    assert (usual_batched_tokens("cpu"), usual_batched_tokens("cuda:1")) == (512, 2048)


@pytest.mark.gpu
def test_a_pool_fills_the_gpu_but_for_its_share(checkpoint, gpu):
    config = EngineConfig(device=gpu, gpu_memory_utilization=0.5)
    engine = Engine(config, load_model(checkpoint, config))
    free, total = torch.cuda.mem_get_info()
    assert 0.3 * total < engine.kv_cache.groups[0].nbytes < 0.5 * total
    assert free > 0.3 * total
