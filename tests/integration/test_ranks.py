"""Followers as real processes, without a service around them."""

import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tandem
from engine.config import EngineConfig
from engine.engine import Engine
from engine.loader import load_model
from engine.parallel.errors import RankLost
from engine.parallel.leader import Leader
from engine.parallel.ranks import ONE_RANK
from engine.parallel.start import start_ranks
from engine.request import Request, SamplingParams
from runtime.errors import StartupError

MODEL = Path(tandem.__file__).parent / "demo_model"
CONFIG = EngineConfig(num_blocks=512, max_model_len=512)


def request() -> Request:
    return Request(
        key=0,
        prompt_token_ids=list(range(3, 203)),
        sampling=SamplingParams(max_tokens=24, temperature=0.8, seed=5, ignore_eos=True),
    )


def start() -> Leader:
    ranks = start_ranks(MODEL, CONFIG, ["cpu", "cpu"])
    assert isinstance(ranks, Leader)
    return ranks


def test_the_demo_model_over_two_processes() -> None:
    alone, engine = request(), Engine(CONFIG, load_model(MODEL, CONFIG))
    engine.submit(alone)
    while engine.has_work():
        engine.step()
    ranks = start()
    [member] = ranks.members
    assert member.process is not None
    lost: list[str] = []
    ended = threading.Event()
    try:
        engine = Engine(CONFIG, load_model(MODEL, CONFIG, ranks=ranks))
        ranks.watch(lambda reason: (lost.append(reason), ended.set()))
        shared = request()
        engine.submit(shared)
        while engine.has_work():
            engine.step()
        assert shared.output_token_ids == alone.output_token_ids
        member.process.send_signal(signal.SIGTERM)  # rank 0 decides when followers end
        member.process.send_signal(signal.SIGINT)
        engine.submit(request())
        engine.step()
        member.process.kill()
        assert ended.wait(2)
        reason = f"tensor-parallel rank 1 (pid {member.process.pid}) was killed by signal 9"
        assert lost == [reason]
        with pytest.raises(RankLost, match="was killed by signal 9"):
            engine.step()
    finally:
        ranks.close()


def test_a_follower_that_cannot_start_is_an_error_of_one_line() -> None:
    ranks = start()
    [member] = ranks.members
    assert member.process is not None
    try:
        member.process.kill()
        with pytest.raises(StartupError, match=r"--tensor-parallel-size 2: .* rank 1 \(pid \d+\) has ended"):
            load_model(MODEL, CONFIG, ranks=ranks)
    finally:
        ranks.close()
    assert member.process.returncode == -signal.SIGKILL


def test_nothing_is_started_for_one_rank_or_for_heads_that_do_not_divide(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("subprocess.Popen", None)
    assert start_ranks(MODEL, CONFIG, ["cpu"]) is ONE_RANK
    with pytest.raises(StartupError, match="--tensor-parallel-size 7: num_attention_heads"):
        start_ranks(MODEL, CONFIG, ["cpu"] * 7)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_demo_model_over_two_gpus() -> None:
    """The tokens of one GPU, over NCCL."""
    config = replace(CONFIG, device="cuda:0", dtype="float32")
    outputs = []
    for devices in (["cuda:0"], ["cuda:0", "cuda:1"]):
        ranks = start_ranks(MODEL, config, devices)
        try:
            made, engine = request(), Engine(config, load_model(MODEL, config, ranks=ranks))
            engine.submit(made)
            while engine.has_work():
                engine.step()
            outputs.append(made.output_token_ids)
        finally:
            ranks.close()
    assert outputs[0] == outputs[1]
