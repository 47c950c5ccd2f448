"""A worker dies at each named point of the protocol: the same tokens, nothing left behind."""

import itertools
import threading
from typing import Any

import pytest

from tests.e2e.harness import Up, eventually
from tests.e2e.test_faults import PROMPT, SEEDED, all_ready, stream

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

NUM_TOKENS = 40
SEARCHED = SEEDED | {"max_tokens": NUM_TOKENS}
salts = (f"crash {number}" for number in itertools.count())

POINTS = (
    "prefill.offered",
    "prefill.step",
    "prefill.frame",
    "prefill.commit",
    "decode.reserved",
    "decode.frame",
    "decode.committed",
    "decode.step",
)
QUICK = {"prefill.commit"}


def bystander(up: Up, want: list[int], wrong: list[str]) -> threading.Thread:
    """A stream beside the disturbed one, which must stay exact."""

    def run() -> None:
        try:
            got = stream(up, {}, **SEARCHED)
            wrong.extend([] if got == want else [f"bystander: {got} for {want}"])
        except Exception as error:  # an assertion of `stream` included: the main thread tells
            wrong.append(f"bystander: {error!r}")

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def expect_exact(up: Up, crashes: dict[str, int], want: list[int]) -> None:
    """One request whose workers crash at these points, each armed once so many tokens have come."""
    wrong: list[str] = []
    beside = bystander(up, want, wrong)
    later: dict[int, Any] = {}
    for point, after in crashes.items():
        if after:
            later[after] = lambda point=point: up.points.arm(point, "crash")
        else:
            up.points.arm(point, "crash")
    got = stream(up, later, cache_salt=next(salts), **SEARCHED)
    beside.join(60)
    assert got == want
    assert not wrong
    for point in crashes:
        assert up.points.hits(point), f"nobody crashed at {point}"


@pytest.mark.parametrize(
    "point", [pytest.param(point, marks=() if point in QUICK else pytest.mark.long) for point in POINTS]
)
def test_a_crash_costs_no_token_and_leaves_nothing(split: Up, point: str) -> None:
    eventually(lambda: all_ready(split), 60, "all workers")
    want = stream(split, {}, prompt=PROMPT, **SEARCHED)
    expect_exact(split, {point: 5 if point == "decode.step" else 0}, want)
    eventually(lambda: all_ready(split), 60, "all workers again")
    eventually(split.is_quiet, 5, f"quiet ({split.held()})")


@pytest.mark.long
def test_a_crash_while_the_request_is_moving(split: Up) -> None:
    """The decode worker dies in mid-stream, then the prefill worker that prefills again for its heir."""
    eventually(lambda: all_ready(split), 60, "all workers")
    want = stream(split, {}, prompt=PROMPT, **SEARCHED)
    expect_exact(split, {"decode.step": 15, "prefill.commit": 14}, want)
    eventually(lambda: all_ready(split), 60, "all workers again")
    eventually(split.is_quiet, 5, f"quiet ({split.held()})")
