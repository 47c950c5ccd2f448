"""Reservations in order, targets only of live transfers; with a fake engine."""

from types import SimpleNamespace

import pytest

from decode_svc.receiving import Receiving
from kvtransfer.plan import Rectangle
from runtime.errors import InvalidRequest
from worker.lanes.stripes import Piece


class FakeEngine:
    """8 blocks; a request holds as many as its `size`."""

    def __init__(self) -> None:
        self.free = list(range(8))
        self.held: dict[str, object] = {}
        self.arrivals = 0

    def enter(self, request: SimpleNamespace) -> None:
        self.arrivals += 1
        request.rank = (request.band, self.arrivals)

    def reserve(self, request: SimpleNamespace) -> bool:
        if request.size > 8:
            raise InvalidRequest("never", field="prompt")
        if request.size > len(self.free):
            return False
        request.block_tables = [[self.free.pop(0) for _ in range(request.size)]]
        self.held[request.key] = request
        return True

    def abort(self, key: str) -> None:
        self.free += self.held.pop(key).block_tables[0]


@pytest.fixture
def parts():
    events: list[tuple[object, ...]] = []
    receiving = Receiving(
        lambda *reservation: events.append(reservation),
        lambda transfer_id, error: events.append((transfer_id, error.field)),
    )
    return FakeEngine(), receiving, events


def request(key: str, size: int, band: int = 0) -> SimpleNamespace:
    return SimpleNamespace(key=key, size=size, band=band, num_cached_tokens=0, block_tables=[])


def test_first_come_first_served_and_the_impossible_is_refused(parts) -> None:
    engine, receiving, events = parts
    for name, size in (("a", 6), ("b", 9), ("c", 4), ("d", 1)):
        receiving.want(engine, name.encode(), request(name, size))
    receiving.reserve_waiting(engine)
    assert events == [(b"a", 6, 0), (b"b", "prompt")]
    assert receiving.num_waiting == 2, "d does not overtake c"
    receiving.drop(engine, b"a")
    receiving.reserve_waiting(engine)
    assert events[2:] == [(b"c", 4, 0), (b"d", 1, 0)]


def test_dropping_a_waiting_request_lets_the_next_one_in(parts) -> None:
    engine, receiving, events = parts
    for name, size in (("a", 8), ("b", 8), ("c", 8)):
        receiving.want(engine, name.encode(), request(name, size))
    receiving.reserve_waiting(engine)
    receiving.drop(engine, b"b")
    receiving.drop(engine, b"a")
    receiving.reserve_waiting(engine)
    assert [event[0] for event in events] == [b"a", b"c"]


def test_the_policy_says_who_is_next(parts) -> None:
    engine, receiving, events = parts
    for name, band in (("a", 0), ("late", 2), ("b", 1), ("first", 0), ("c", 1)):
        receiving.want(engine, name.encode(), request(name, 8, band))
    for expected in ("a", "first", "b", "c", "late"):
        receiving.reserve_waiting(engine)
        assert events[-1][0] == expected.encode()
        receiving.drop(engine, expected.encode())


def test_a_frame_is_for_its_own_blocks_and_for_none_after_the_end(parts) -> None:
    engine, receiving, _ = parts
    receiving.want(engine, b"a", request("a", 3))
    receiving.reserve_waiting(engine)
    found = receiving.target(b"a", Rectangle(0, 1, 2, 4, 5))
    assert found == Piece(group=0, block_ids=[1, 2], first_layer=4, num_layers=5)
    receiving.drop(engine, b"a")
    assert receiving.target(b"a", Rectangle(0, 0, 2, 0, 2)) is None
    assert receiving.take(b"a") is None
    assert sorted(engine.free) == list(range(8))
