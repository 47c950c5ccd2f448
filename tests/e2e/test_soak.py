"""Random requests under random faults, briefly; `make chaos ARGS="--seconds 300"` does it at length."""

import pytest

from tests.e2e.harness import Up
from tests.faults.soak import soak

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def test_no_fault_is_seen_by_a_client(split: Up) -> None:
    report = soak(split, seconds=20, seed=20)
    assert not report.wrong, f"{report}\n{split.stderr[-10_000:]}"
    assert len(report.faults) >= 2
    assert report.answers.total() >= 20
