"""Clients that leave, and deadlines that pass, while a request moves to another decode worker; on each face.

The worker that it moves to stands at a fault point when its client goes.
"""

import itertools
import os
import signal
import time

import pytest

from tests.e2e.harness import Up, eventually
from tests.e2e.test_faults import all_ready, busy
from tests.faults.calls import DEADLINE, FACES, Call

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(180)]

PROMPT = list(range(3, 403))
NUM_TOKENS = 400
DEADLINE_S = 5.0
MOVES_S = 1.6
"""The new worker stands still for so long: less than what counts as a hang."""

salts = (f"moves {number}" for number in itertools.count())


def expect_whole(up: Up) -> None:
    eventually(lambda: all_ready(up), 60, "all workers")
    eventually(up.is_quiet, 5, f"LEAK0 ({up.held()})")


def begin(up: Up, face: str, timeout_s: float | None = None) -> Call:
    """A request that has tokens and needs 8 s more for the others, several in a step."""
    up.points.arm("decode.step", "slow 0.1")
    call = FACES[face](up, PROMPT, NUM_TOKENS, next(salts), timeout_s)
    eventually(lambda: len(up.points.hits("decode.step")) > 5, 20, "tokens")
    return call


def move(up: Up) -> None:
    """Kill its worker, and wait until it has come to another one, which stands still now."""
    worker_id = f"decode-{busy(up, 'decode')}"
    pid = next(worker["pid"] for worker in up.state()["workers"] if worker["id"] == worker_id)
    up.points.arm("decode.moved", f"slow {MOVES_S}")
    os.kill(pid, signal.SIGKILL)
    assert up.points.wait_hit("decode.moved", 5) != pid


@pytest.mark.parametrize("face", FACES)
def test_a_client_leaves(split: Up, face: str) -> None:
    expect_whole(split)
    try:
        call = begin(split, face)
        move(split)
        call.leave()
        eventually(lambda: not split.state()["requests"], 1, "the gateway's end of it")
    finally:
        split.points.release("decode.moved")
        split.points.release("decode.step")
    expect_whole(split)


@pytest.mark.parametrize("face", FACES)
def test_a_deadline_passes(split: Up, face: str) -> None:
    expect_whole(split)
    try:
        start_s = time.monotonic()
        call = begin(split, face, DEADLINE_S)
        time.sleep(max(start_s + DEADLINE_S - 1.0 - time.monotonic(), 0))
        move(split)
        moved_s = time.monotonic() - start_s
        assert moved_s < DEADLINE_S
        assert call.outcome() == DEADLINE
        assert DEADLINE_S - 0.05 < time.monotonic() - start_s < moved_s + MOVES_S
    finally:
        split.points.release("decode.moved")
        split.points.release("decode.step")
    expect_whole(split)
