"""Choices and memberships, with the clock in hand."""

from typing import Any

import pytest

from gateway.attempt import Source
from gateway.registry import KEEP_DOWN_S, Registry, State
from gateway.router import Candidate, Route, choose
from protos.tandem.v1 import common_pb2, registry_pb2
from runtime.clock import ManualClock
from runtime.errors import InvalidRequest, Mismatch
from runtime.limits import HANG_S

READY = common_pb2.WORKER_STATE_READY


def prefill(worker_id: str, queued: int = 0, cached: int = 0) -> Candidate:
    return Candidate(
        worker_id=worker_id, role=Source.PREFILL, queued_prefill_tokens=queued, cached_tokens=cached
    )


def decode(worker_id: str, requests: int = 0, free: int = 10, cached: int = 0) -> Candidate:
    return Candidate(
        worker_id=worker_id,
        role=Source.DECODE,
        num_requests=requests,
        blocks_free=free,
        cached_tokens=cached,
    )


def pick(*candidates: Candidate, tokens: int = 10, threshold: int = 0, avoid: tuple[str, ...] = ()) -> Any:
    route = choose(candidates, tokens, local_prefill_threshold=threshold, avoid=avoid)
    return route and (route.prefill, route.decode)


def test_least_loaded() -> None:
    pool = [prefill("p1", 50), prefill("p2", 10), decode("d1", 3), decode("d2", 1, 5), decode("d3", 1, 9)]
    assert pick(*pool) == ("p2", "d3")
    assert choose([], 1, local_prefill_threshold=0) is None
    assert pick(prefill("p1")) is None
    assert choose([decode("d1")], 1, local_prefill_threshold=0) == Route(decode="d1", prefill=None)


def test_a_warm_prefill_worker_is_worth_the_tokens_that_it_saves() -> None:
    for queued, chosen in ((63, "warm"), (65, "cold")):
        pool = [prefill("cold"), prefill("warm", queued, cached=64), decode("d1")]
        assert pick(*pool, tokens=100) == (chosen, "d1")


def test_among_equally_busy_decode_workers_the_one_that_lacks_least() -> None:
    pool = [decode("d1", 2, free=90), decode("d2", 2, free=5, cached=32), decode("d3", 3, cached=64)]
    assert pick(*pool) == (None, "d2")


def test_threshold_and_avoid() -> None:
    pool = [prefill("p1"), prefill("p2", 5), decode("d1"), decode("d2", 9)]
    assert pick(*pool, tokens=9, threshold=10) == (None, "d1")
    assert pick(*pool, tokens=10, threshold=10) == ("p1", "d1")
    assert pick(*pool, avoid=("p1", "d1")) == ("p2", "d2")
    assert pick(*pool, avoid=("p1", "p2", "d1", "d2")) == (None, "d1")


def info(
    worker_id: str = "d1", boot: str = "b1", tokenizer: str = "t", **facts: Any
) -> registry_pb2.WorkerInfo:
    model = {"model_hash": "m", "tokenizer_hash": tokenizer, "max_model_len": 10, "vocab_size": 5} | facts
    identity = common_pb2.WorkerIdentity(worker_id=worker_id, boot_id=boot, address="h:1")
    return registry_pb2.WorkerInfo(
        identity=identity,
        role=common_pb2.WORKER_ROLE_DECODE,
        model=registry_pb2.ModelFacts(**model),
        protocol_major=1,
    )


def test_a_worker_lives_falls_silent_and_is_forgotten() -> None:
    clock = ManualClock()
    registry = Registry(clock, "t")
    worker = registry.register(info())
    assert worker.state is State.STARTING
    assert registry.heartbeat(worker, READY)
    clock.advance(HANG_S)
    assert registry.expire() == []
    clock.advance(0.01)
    assert registry.expire() == [worker]
    assert registry.expire() == []
    assert not registry.heartbeat(worker, READY)
    assert (registry.alive(), registry.all()) == ([], [worker])
    registry.check()
    clock.advance(KEEP_DOWN_S + 1)
    registry.expire()
    assert registry.all() == []
    assert registry.facts is None


def test_a_silence_while_we_did_not_listen_is_excused() -> None:
    clock = ManualClock()
    registry = Registry(clock, "t")
    worker = registry.register(info())
    clock.advance(10)
    registry.excuse(10 - HANG_S + 0.001)
    assert registry.expire() == []
    clock.advance(0.01)
    assert registry.expire() == [worker]


def test_a_new_boot_replaces_the_old_one() -> None:
    registry = Registry(ManualClock(), "t")
    old = registry.register(info(boot="b1"))
    new = registry.register(info(boot="b2"))
    assert not registry.leave(old)
    assert not registry.heartbeat(old, READY)
    assert registry.get("d1") is new
    assert (old.restarts, new.restarts) == (0, 1)
    assert registry.register(info(boot="b2")).restarts == 1, "the same life, registered again"
    new = registry.register(info(boot="b2"))
    assert registry.leave(new)
    assert not registry.leave(new)
    registry.check()


def test_mismatch_names_the_fields() -> None:
    registry = Registry(ManualClock(), "t")
    with pytest.raises(Mismatch, match="tokenizer_hash"):
        registry.register(info(tokenizer="other"))
    first = registry.register(info())
    with pytest.raises(Mismatch, match="max_model_len, eos_token_ids"):
        registry.register(info("d2", max_model_len=11, eos_token_ids=[1]))
    registry.register(info(boot="b2", max_model_len=11))
    registry.leave(first)
    with pytest.raises(Mismatch):
        registry.register(info("d2"))


def test_incomplete_info() -> None:
    registry = Registry(ManualClock(), "t")
    with pytest.raises(InvalidRequest) as raised:
        registry.register(info(worker_id=""))
    assert raised.value.field == "identity.worker_id"
    broken = info()
    broken.role = common_pb2.WORKER_ROLE_UNSPECIFIED
    with pytest.raises(InvalidRequest):
        registry.register(broken)
    old = info()
    old.protocol_major = 9
    with pytest.raises(Mismatch, match="protocol_major"):
        registry.register(old)


def test_states_of_a_worker() -> None:
    registry = Registry(ManualClock(), "t")
    worker = registry.register(info())
    registry.heartbeat(worker, common_pb2.WORKER_STATE_DRAINING)
    assert worker.state is State.DRAINING
    registry.heartbeat(worker, common_pb2.WORKER_STATE_DOWN)
    assert worker.state is State.DOWN
    registry.check()
