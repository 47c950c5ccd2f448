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
from engine.parallel.start import start_ranks, starting
from engine.request import Request, SamplingParams
from runtime.clock import SystemClock
from runtime.errors import StartupError
from runtime.limits import RANK_TIMEOUT_S

MODEL = Path(tandem.__file__).parent / "demo_model"
CONFIG = EngineConfig(num_blocks=512, max_model_len=512)
OVERLAPPED = replace(CONFIG, overlap="on", max_num_seqs=4)


def request(max_tokens: int = 24) -> Request:
    return Request(
        key=0,
        prompt_token_ids=list(range(3, 203)),
        sampling=SamplingParams(max_tokens=max_tokens, temperature=0.8, seed=5, ignore_eos=True),
    )


def tokens(engine: Engine) -> list[int]:
    """Of one request, to its end."""
    served = request()
    engine.submit(served)
    while engine.has_work():
        engine.step()
    return served.output_token_ids


def start() -> Leader:
    ranks = start_ranks(MODEL, CONFIG, ["cpu", "cpu"])
    assert isinstance(ranks, Leader)
    return ranks


def test_the_demo_model_over_two_processes() -> None:
    alone = tokens(Engine(CONFIG, load_model(MODEL, CONFIG)))
    ranks = start()
    [member] = ranks.members
    assert member.process is not None
    lost: list[str] = []
    ended = threading.Event()
    try:
        engine = Engine(CONFIG, load_model(MODEL, CONFIG, ranks=ranks))
        ranks.watch(lambda reason: (lost.append(reason), ended.set()))
        assert tokens(engine) == alone
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


def fly(engine: Engine) -> None:
    """Until each step returns with the next one on its way."""
    engine.submit(request(max_tokens=200))
    while not engine._pipeline.in_flight:
        engine.step()


def test_overlapped_steps_over_two_processes_and_the_end_of_one_between_them() -> None:
    alone = tokens(Engine(CONFIG, load_model(MODEL, CONFIG)))
    ranks = start()
    [member] = ranks.members
    assert member.process is not None
    try:
        engine = Engine(OVERLAPPED, load_model(MODEL, OVERLAPPED, ranks=ranks))
        lost: list[str] = []
        ended = threading.Event()
        ranks.watch(lambda reason: (lost.append(reason), ended.set()))
        assert tokens(engine) == alone
        fly(engine)
        member.process.kill()
        with pytest.raises(RankLost, match="was killed by signal 9"):
            engine.step()
        assert ended.wait(2)
        assert lost == [f"tensor-parallel rank 1 (pid {member.process.pid}) was killed by signal 9"]
    finally:
        ranks.close()


@pytest.mark.long
def test_a_process_that_stops_between_overlapped_steps_is_found_by_the_deadline() -> None:
    ranks = start()
    [member] = ranks.members
    assert member.process is not None
    try:
        engine = Engine(OVERLAPPED, load_model(MODEL, OVERLAPPED, ranks=ranks))
        lost: list[str] = []
        ranks.watch(lost.append)
        fly(engine)
        member.process.send_signal(signal.SIGSTOP)
        began = SystemClock().now()
        with pytest.raises(RankLost):
            engine.step()
        assert RANK_TIMEOUT_S <= SystemClock().now() - began < 3 * RANK_TIMEOUT_S
        assert len(lost) == 1
    finally:
        ranks.close()


def test_a_follower_that_cannot_start_is_an_error_of_one_line() -> None:
    ranks = start()
    [member] = ranks.members
    assert member.process is not None
    member.process.kill()
    message = r"--tensor-parallel-size 2: .* rank 1 \(pid \d+\) has ended"
    with pytest.raises(StartupError, match=message), starting(ranks):
        load_model(MODEL, CONFIG, ranks=ranks)
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
    """The tokens of one GPU, over NCCL: steps kernel by kernel, overlapped, captured, both."""
    captured = replace(OVERLAPPED, device="cuda:0", dtype="float32")
    eager = replace(captured, cuda_graphs="off")
    ways = [eager, captured, *(replace(each, overlap="off") for each in (eager, captured))]
    outputs = []
    for config, devices in [(captured, ["cuda:0"]), *((each, ["cuda:0", "cuda:1"]) for each in ways)]:
        ranks = start_ranks(MODEL, config, devices)
        try:
            made, engine = request(), Engine(config, load_model(MODEL, config, ranks=ranks))
            engine.submit(made)
            while engine.has_work():
                engine.step()
            outputs.append(made.output_token_ids)
        finally:
            ranks.close()
    assert outputs == outputs[:1] * len(outputs)
