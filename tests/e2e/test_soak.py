"""Random requests under random faults; `make chaos ARGS="--seconds 1800"` does it at length."""

import pytest

from tests.e2e.harness import Up
from tests.faults.soak import soak

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


@pytest.mark.parametrize("seconds", [60, pytest.param(300, marks=pytest.mark.long)])
def test_no_fault_is_seen_by_a_client(split: Up, seconds: int) -> None:
    report = soak(split, seconds=seconds, seed=20)
    assert not report.wrong, f"{report}\n{split.stderr[-10_000:]}"
    assert len(report.faults) >= seconds // 15
    assert report.answers.total() >= 20
