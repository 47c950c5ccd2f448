import itertools

import pytest

from kvtransfer.states import (
    ENDED,
    TRANSITIONS,
    Tombstones,
    TransferEvent,
    TransferMachine,
    TransferState,
    fold_checksum,
)


@pytest.mark.parametrize(("state", "event"), list(itertools.product(TransferState, TransferEvent)))
def test_every_pair_moves_by_the_table_or_changes_nothing(state, event):
    machine = TransferMachine()
    machine.state = state
    moved = machine.apply(event)
    assert moved == ((state, event) in TRANSITIONS)
    assert machine.state == TRANSITIONS.get((state, event), state)


def test_an_ended_transfer_never_changes():
    assert not [state for state, _ in TRANSITIONS if state in ENDED]


def test_tombstones_keep_the_first_end_and_forget_the_oldest():
    ended = Tombstones(capacity=2)
    ended.bury(b"a", TransferState.COMMITTED)
    ended.bury(b"a", TransferState.ABORTED)
    assert ended.end_of(b"a") is TransferState.COMMITTED
    ended.bury(b"b", TransferState.ABORTED)
    ended.bury(b"c", TransferState.ABORTED)
    assert len(ended) == 2
    assert b"a" not in ended
    assert ended.end_of(b"c") is TransferState.ABORTED


def test_the_folded_checksum_depends_on_order_and_count():
    folds = set()
    for checksums in ((), (0,), (0, 0), (1, 2), (2, 1), (1, 2, 0)):
        folded = 0
        for checksum in checksums:
            folded = fold_checksum(folded, checksum)
        folds.add(folded)
    assert len(folds) == 6
    assert all(0 <= folded < 2**64 for folded in folds)
