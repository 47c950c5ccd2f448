"""A decode worker at the other end of a cable on which packets are lost: some of them, then all."""

from collections.abc import Iterator

import pytest

from tests.e2e.harness import eventually
from tests.e2e.test_partitions import complete
from tests.faults.fleet import CabledFleet
from tests.faults.namespaces import Namespace, namespace, why_not

REASON = why_not()
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.long,
    pytest.mark.timeout(240),
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]


@pytest.fixture(scope="module")
def cable() -> Iterator[Namespace]:
    with namespace() as made:
        yield made


@pytest.fixture(scope="module")
def fleet(cable: Namespace) -> Iterator[CabledFleet]:
    with CabledFleet(cable) as made:
        yield made


def expect_whole(fleet: CabledFleet) -> None:
    eventually(fleet.is_whole, 30, "all workers again")
    eventually(lambda: not fleet.held(), 5, "quiet")


@pytest.mark.parametrize("share", [0.01, 0.3])
def test_lost_packets_cost_no_token(fleet: CabledFleet, cable: Namespace, share: float) -> None:
    expect_whole(fleet)
    want = complete(fleet)
    with cable.dropping(share):
        for number in range(6):
            assert complete(fleet, cache_salt=f"loss {share} {number}") == want
        assert cable.num_dropped() > 0
    expect_whole(fleet)


def test_a_cut_cable_leaves_its_worker_behind(fleet: CabledFleet, cable: Namespace) -> None:
    expect_whole(fleet)
    want = complete(fleet)
    with cable.dropping(1.0):
        for number in range(3):
            assert complete(fleet, cache_salt=f"cut {number}") == want
        eventually(lambda: fleet.worker_states()["decode-1"] == "down", 5, "decode-1 down")
        assert cable.num_dropped() > 0
    expect_whole(fleet)
