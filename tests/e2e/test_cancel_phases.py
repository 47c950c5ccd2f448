"""Clients that leave, and deadlines that pass, in each phase of a request and on each face.

A fault point makes the phase last, so that the request is in it for certain when its client goes.
"""

import itertools

import pytest

from tests.e2e.harness import Up, eventually
from tests.faults.calls import DEADLINE, FACES, seconds

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

PHASES = {
    "prefilling": ("prefill.step", "slow 0.2"),
    "kv in transit": ("prefill.frame", "slow 0.4"),
    "committed": ("decode.committed", "slow 0.8"),
    "streaming": ("decode.step", "slow 0.02"),
}
PROMPT = list(range(3, 1603))
DEADLINE_S = 0.5
salts = (f"phase {number}" for number in itertools.count())

CELLS = [(face, phase) for face in FACES for phase in PHASES]
QUICK = {("http-stream", "kv in transit"), ("grpc-unary", "streaming")}
"""Those of the normal suite; all others are run by `make test-long`."""


def cells() -> list[object]:
    marks = {cell: () if cell in QUICK else pytest.mark.long for cell in CELLS}
    return [pytest.param(*cell, id="-".join(cell), marks=marks[cell]) for cell in CELLS]


@pytest.mark.parametrize(("face", "phase"), cells())
def test_a_client_leaves(split: Up, face: str, phase: str) -> None:
    eventually(split.is_quiet, 30, "a quiet start")
    point, action = PHASES[phase]
    with split.points.armed(point, action):
        call = FACES[face](split, PROMPT, 400, next(salts))
        split.points.wait_hit(point)
        call.leave()
        eventually(split.is_quiet, 5, f"LEAK0 ({split.held()})")


@pytest.mark.parametrize(("face", "phase"), cells())
def test_a_deadline_passes(split: Up, face: str, phase: str) -> None:
    eventually(split.is_quiet, 30, "a quiet start")
    point, action = PHASES[phase]
    with split.points.armed(point, action):
        call = FACES[face](split, PROMPT, 400, next(salts), DEADLINE_S)
        outcome, took_s = seconds(call.outcome)
        assert outcome == DEADLINE
        assert DEADLINE_S - 0.05 <= took_s < 5
        eventually(split.is_quiet, 5, f"LEAK0 ({split.held()})")
        assert split.points.hits(point), f"the deadline passed before {point}"
