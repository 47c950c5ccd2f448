"""Bad, late, duplicate and replayed messages: a violation retires the link, all else is a counted no-op."""

from dataclasses import replace

import pytest

from kvtransfer.actions import (
    ABORTED,
    DATA_LOSS,
    Deliver,
    Granted,
    Offered,
    Send,
    TransferCommitted,
    TransferFailed,
)
from kvtransfer.errors import LinkViolation
from kvtransfer.messages import (
    Cancel,
    Commit,
    CommitAck,
    Credit,
    FirstToken,
    Offer,
    Ping,
    Rejected,
    Rendezvous,
    Reserved,
)
from kvtransfer.plan import Rectangle
from kvtransfer.receiver import ReceiverLink
from kvtransfer.sender import SenderLink
from kvtransfer.states import Tombstones, TransferState
from runtime.clock import ManualClock
from runtime.errors import AlreadyExists, Cancelled, InvalidRequest, Unavailable
from runtime.limits import COMMIT_TIMEOUT_S, RESERVE_TIMEOUT_S
from tests.unit.kvtransfer.harness import FACTS, ONE_CELL, TOKEN, WELCOME, Harness

ID = b"id"
HEADER = replace(ONE_CELL, first_block=1, num_layers=2, checksum=5)
COMMIT = Commit(ticket=1, transfer_id=ID, num_frames=0, checksum=0, first_tokens=TOKEN, cached_tokens=0)


@pytest.fixture
def receiver():
    """Ticket 1 expects blocks 1 and 2."""
    link = ReceiverLink(facts=FACTS, welcome=WELCOME, clock=ManualClock())
    link.on_message(Offer(transfer_id=ID, num_tokens=5))
    link.reserve(ID, num_blocks=4, num_cached_tokens=2)
    link.check()
    return link


@pytest.fixture
def sender():
    """One open transfer of five tokens, not yet granted; no credits."""
    link = SenderLink(facts=FACTS, welcome=WELCOME, clock=ManualClock())
    link.offer(ID, 5)
    return link


@pytest.mark.parametrize(
    "change",
    [
        {"ticket": 0},
        {"ticket": 2},
        {"ticket": 1 << 63},
        {"sequence": 1},
        {"group": 2},
        {"first_block": 0},
        {"first_block": 3},
        {"num_blocks": 3},
        {"num_blocks": 0},
        {"num_blocks": (1 << 32) - 1},
        {"first_layer": 2},
        {"num_layers": 0},
        {"num_layers": (1 << 32) - 1},
        {"size_index": 3},
        {"size_index": 2},
    ],
)
def test_a_bad_header_is_a_violation_and_takes_no_slab(receiver, change):
    with pytest.raises(LinkViolation):
        receiver.on_message(replace(HEADER, **change))
    receiver.check()
    assert receiver.num_free_slabs == WELCOME.num_slabs
    assert receiver.state_of(ID) is TransferState.RESERVED


def test_a_header_of_a_group_that_does_not_travel_is_a_violation_though_its_ticket_is_dead(receiver):
    """The size of what comes over a transport depends on the group."""
    receiver.cancel(ID)
    with pytest.raises(LinkViolation, match="group 2 of 2"):
        receiver.on_message(replace(HEADER, group=2))
    assert receiver.num_free_slabs == WELCOME.num_slabs


def test_a_replayed_or_overlapping_header_is_a_violation(receiver):
    receiver.on_message(HEADER)
    for header in (HEADER, replace(HEADER, sequence=1)):
        with pytest.raises(LinkViolation):
            receiver.on_message(header)
        receiver.check()


def test_a_header_without_credit_is_a_violation(receiver):
    receiver.on_message(HEADER)
    receiver.on_message(replace(HEADER, sequence=1, first_block=2))
    with pytest.raises(LinkViolation, match="credit"):
        receiver.on_message(replace(HEADER, sequence=2, first_layer=2, num_layers=1))


def test_a_header_before_the_offer_is_a_violation():
    receiver = ReceiverLink(facts=FACTS, welcome=WELCOME, clock=ManualClock())
    receiver.reserve(ID, 4, 2)
    with pytest.raises(LinkViolation):
        receiver.on_message(HEADER)


def test_a_dead_tickets_frame_is_received_dropped_and_credited(receiver):
    receiver.cancel(ID)
    (post,) = receiver.on_message(replace(HEADER, first_block=99, sequence=7))
    assert post.frame.transfer_id is None
    assert not receiver.may_scatter(post.frame)
    assert receiver.frame_received(post.frame) == [Send(message=Credit(slabs=1))]
    assert receiver.statistics().dropped_frames == 1
    receiver.check()


def test_a_cancel_between_delivery_and_scatter_forbids_the_scatter(receiver):
    (post,) = receiver.on_message(HEADER)
    receiver.frame_received(post.frame)
    assert receiver.may_scatter(post.frame)
    receiver.on_message(Cancel(transfer_id=ID, reason="gone"))
    assert not receiver.may_scatter(post.frame)
    assert receiver.frame_scattered(post.frame, None) == [Send(message=Credit(slabs=1))]
    assert receiver.num_free_slabs == WELCOME.num_slabs


def test_damaged_bytes_fail_their_transfer_only(receiver):
    (post,) = receiver.on_message(HEADER)
    assert receiver.frame_received(post.frame) == [Deliver(frame=post.frame)]
    credit, cancel, failed = receiver.frame_scattered(post.frame, 6)
    assert credit == Send(message=Credit(slabs=1))
    assert cancel.message.transfer_id == ID
    assert (failed.code, failed.retryable) == (DATA_LOSS, True)
    assert not receiver.retired
    receiver.check()
    receiver.on_message(Offer(transfer_id=b"next", num_tokens=2))
    assert receiver.reserve(b"next", 1, 0).ticket == 2


def test_a_frame_whose_blocks_are_gone_ends_its_transfer(receiver):
    (post,) = receiver.on_message(HEADER)
    receiver.frame_received(post.frame)
    credit, cancel, failed = receiver.frame_scattered(post.frame, None)
    assert credit == Send(message=Credit(slabs=1))
    assert cancel.message.transfer_id == failed.transfer_id == ID
    assert (failed.code, failed.retryable) == (ABORTED, True)
    receiver.check()


@pytest.mark.parametrize("change", [{"num_frames": 1}, {"checksum": 1}, {}])
def test_a_commit_that_does_not_match_or_leaves_blocks_uncovered_is_refused(receiver, change):
    cancel, failed = receiver.on_message(replace(COMMIT, **change))
    assert isinstance(cancel.message, Cancel)
    assert isinstance(failed, TransferFailed)
    assert receiver.state_of(ID) is TransferState.ABORTED


def test_a_finished_commit_needs_no_blocks(receiver):
    tokens = (FirstToken(choice=0, token_id=1, finish_reason="stop"),)
    commit = replace(COMMIT, first_tokens=tokens)
    ack, done = receiver.on_message(commit)
    assert ack == Send(message=CommitAck(transfer_id=ID))
    assert done == TransferCommitted(transfer_id=ID, commit=commit)
    # A repeated Commit is acknowledged again.
    assert receiver.on_message(commit) == [ack]
    assert receiver.statistics().stale_messages == 1


def test_stale_messages_at_the_receiver_change_nothing(receiver):
    before = repr(receiver)
    assert receiver.on_message(replace(COMMIT, ticket=9)) == []
    assert receiver.on_message(Ping(sequence=1)) == []
    again = receiver.on_message(Offer(transfer_id=ID, num_tokens=5))
    assert again == [Send(message=Reserved(transfer_id=ID, ticket=1, num_cached_tokens=2))]
    assert receiver.on_message(Cancel(transfer_id=b"unknown", reason="")) == []
    (unknown,) = receiver.on_message(replace(COMMIT, transfer_id=b"unknown"))
    assert isinstance(unknown.message, Cancel)
    assert repr(receiver) == before
    assert receiver.statistics().stale_messages == 4
    with pytest.raises(LinkViolation):
        receiver.on_message(Rendezvous(blob=b""))


def test_reservations_and_offers_in_either_order():
    receiver = ReceiverLink(facts=FACTS, welcome=WELCOME, clock=ManualClock())
    assert receiver.on_message(Offer(transfer_id=b"a", num_tokens=5)) == [
        Offered(transfer_id=b"a", num_tokens=5)
    ]
    with pytest.raises(InvalidRequest):
        receiver.reserve(b"a", num_blocks=2, num_cached_tokens=0)
    assert receiver.reserve(b"a", 3, 0).ticket == 1
    with pytest.raises(AlreadyExists):
        receiver.reserve(b"a", 3, 0)
    reserved = receiver.reserve(b"b", 3, 2)
    assert receiver.on_message(Offer(transfer_id=b"b", num_tokens=6)) == [Send(message=reserved)]
    receiver.reserve(b"c", 1, 0)
    rejected, failed = receiver.on_message(Offer(transfer_id=b"c", num_tokens=6))
    assert (rejected.message.retryable, failed.retryable) == (False, False)
    receiver.check()


def test_an_ended_transfer_can_be_neither_reserved_nor_offered_again(receiver, sender):
    receiver.on_message(Cancel(transfer_id=b"early", reason=""))
    with pytest.raises(Cancelled):
        receiver.reserve(b"early", 1, 0)
    (answer,) = receiver.on_message(Offer(transfer_id=b"early", num_tokens=1))
    assert isinstance(answer.message, Rejected)
    assert answer.message.retryable
    sender.on_message(Cancel(transfer_id=b"early", reason=""))
    with pytest.raises(Cancelled):
        sender.offer(b"early", 1)
    with pytest.raises(AlreadyExists):
        sender.offer(ID, 1)


def test_a_held_offer_is_rejected_in_time():
    clock = ManualClock()
    receiver = ReceiverLink(facts=FACTS, welcome=WELCOME, clock=clock)
    receiver.on_message(Offer(transfer_id=ID, num_tokens=1))
    clock.advance(RESERVE_TIMEOUT_S - 0.1)
    assert receiver.expire() == []
    assert receiver.next_deadline() == RESERVE_TIMEOUT_S
    clock.advance(0.2)
    (rejected,) = receiver.expire()
    assert rejected.message.retryable
    assert receiver.next_deadline() is None
    with pytest.raises(Cancelled):
        receiver.reserve(ID, 1, 0)


@pytest.mark.parametrize(
    "message",
    [
        Reserved(transfer_id=ID, ticket=1, num_cached_tokens=6),
        CommitAck(transfer_id=ID),
        Credit(slabs=3),
        WELCOME,
    ],
)
def test_a_sender_knows_violations(sender, message):
    with pytest.raises(LinkViolation):
        sender.on_message(message)


def test_stale_messages_at_the_sender_change_nothing(sender):
    before = repr(sender)
    for message in (
        Reserved(transfer_id=b"x", ticket=1, num_cached_tokens=0),
        Rejected(transfer_id=b"x", code=1, reason="", retryable=False),
        CommitAck(transfer_id=b"x"),
        Cancel(transfer_id=b"x", reason=""),
    ):
        assert sender.on_message(message) == []
    assert sender.on_message(Ping(sequence=0)) == []
    sender.enqueue(b"x", [Rectangle(0, 0, 1, 0, 1)])
    assert sender.commit(b"x", TOKEN, 0) == []
    assert repr(sender) == before
    assert sender.statistics().stale_messages == 6


def test_a_rejection_ends_the_offer(sender):
    (failed,) = sender.on_message(Rejected(transfer_id=ID, code=8, reason="full", retryable=True))
    assert failed == TransferFailed(transfer_id=ID, code=8, reason="full", retryable=True)
    sender.check()


def test_an_offer_that_nobody_asked_for_expires_and_a_known_one_waits_for_room():
    clock = ManualClock()
    sender = SenderLink(facts=FACTS, welcome=WELCOME, clock=clock)
    receiver = ReceiverLink(facts=FACTS, welcome=WELCOME, clock=clock)
    for transfer_id in (b"known", b"unknown"):
        receiver.on_message(sender.offer(transfer_id, 5))
    receiver.hold(b"known")
    receiver.hold(b"never offered")
    clock.advance(RESERVE_TIMEOUT_S + 0.1)
    (rejected,) = receiver.expire()
    assert sender.expire() == []
    (failed,) = sender.on_message(rejected.message)
    assert (failed.transfer_id, failed.retryable) == (b"unknown", True)
    assert receiver.reserve(b"known", 3, 0).transfer_id == b"known"
    receiver.check()
    sender.check()


def test_a_cached_prefix_does_not_travel_and_credits_bound_the_frames(sender):
    sender.enqueue(ID, [Rectangle(0, 0, 2, 0, 1)])
    (granted,) = sender.on_message(Reserved(transfer_id=ID, ticket=4, num_cached_tokens=2))
    assert granted == Granted(transfer_id=ID, num_cached_tokens=2)
    assert sender.next_frame() is None
    assert sender.next_frame() is None
    sender.on_message(Credit(slabs=1))
    frame = sender.next_frame()
    assert frame.rectangle == Rectangle(0, 1, 1, 0, 1)
    assert sender.frame_gathered(frame, 3).ticket == 4
    assert sender.statistics().credit_waits == 1
    sender.check()


def test_frames_are_sent_round_robin():
    harness = Harness()
    for transfer_id in (b"a", b"b"):
        harness.offer(transfer_id, 8)
        harness.enqueue(transfer_id, 0, 4)
        harness.reserve(transfer_id, 8)
    for _ in range(4):
        harness.step("to_receiver")
        harness.step("to_sender")
    order = []
    while len(order) < 6:
        if harness.step("gather"):
            order.append(harness.gathered[-1].transfer_id)
        for name in ("send", "to_receiver", "receive", "scatter", "to_sender"):
            harness.step(name)
    assert order == [b"a", b"b"] * 3


def test_a_frame_cancelled_while_it_was_gathered_gives_its_credit_back(sender):
    sender.on_message(Credit(slabs=2))
    sender.on_message(Reserved(transfer_id=ID, ticket=1, num_cached_tokens=0))
    sender.enqueue(ID, [Rectangle(0, 0, 1, 0, 1)])
    frame = sender.next_frame()
    sender.cancel(ID)
    assert sender.frame_gathered(frame, 1) is None
    assert "credits 2/2" in repr(sender)
    sender.check()


def committed_but_unacknowledged():
    """A harness whose receiver has committed and whose sender does not know."""
    harness = Harness()
    harness.offer(ID, 5)
    harness.reserve(ID, 5)
    harness.enqueue(ID, 0, 3)
    harness.commit(ID)
    while harness.receiver.state_of(ID) is not TransferState.COMMITTED:
        for name in harness.STEPS:
            harness.step(name)
    harness.to_sender = [m for m in harness.to_sender if not isinstance(m, CommitAck)]
    return harness


def test_an_unacknowledged_commit_expires():
    harness = committed_but_unacknowledged()
    harness.clock.advance(COMMIT_TIMEOUT_S + 0.1)
    _, failed = harness.sender.expire()
    assert failed.transfer_id == ID


def test_the_next_epoch_repeats_an_unacknowledged_commit():
    harness = committed_but_unacknowledged()
    harness.sender.offer(b"open", 1)
    (failed,) = harness.sender.retire("reset")
    assert failed.transfer_id == b"open"
    assert harness.receiver.retire("reset") == []
    ended = harness.receiver._ended
    sender = SenderLink(facts=FACTS, welcome=WELCOME, clock=harness.clock, ended=Tombstones())
    receiver = ReceiverLink(facts=FACTS, welcome=WELCOME, clock=harness.clock, ended=ended)
    (repeated,) = sender.adopt(harness.sender.take_unacknowledged())
    sender.check()
    (ack,) = receiver.on_message(repeated.message)
    assert sender.on_message(ack.message) == [TransferCommitted(transfer_id=ID)]
    assert sender.num_transfers == harness.sender.num_transfers == 0


def test_a_retired_epoch_fails_its_transfers_and_ignores_messages(receiver, sender):
    (post,) = receiver.on_message(HEADER)
    receiver.frame_received(post.frame)
    (failed,) = receiver.retire("peer died")
    assert failed == TransferFailed(transfer_id=ID, code=10, reason="peer died", retryable=True)
    assert not receiver.may_scatter(post.frame)
    assert receiver.on_message(replace(HEADER, sequence=1)) == []
    assert receiver.frame_scattered(post.frame, None) == []
    assert receiver.num_free_slabs == WELCOME.num_slabs
    assert len(sender.retire("peer died")) == 1
    assert sender.on_message(Credit(slabs=99)) == []
    for act in (lambda: sender.offer(b"y", 1), lambda: receiver.reserve(b"y", 1, 0)):
        with pytest.raises(Unavailable):
            act()
