"""Merging frames of two workers and of several attempts."""

from collections.abc import Sequence
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.attempt import Failed, Finished, Progress, Source
from protos.tandem.v1 import common_pb2 as pb
from runtime.errors import Overloaded, Unavailable

P, D = Source.PREFILL, Source.DECODE
GONE = Unavailable("gone", retryable=True)


def frame(start: int, token_ids: Sequence[int], attempt: int = 0, **fields: Any) -> pb.TokenFrame:
    return pb.TokenFrame(attempt=attempt, start_index=start, token_ids=token_ids, **fields)


def end(attempt: int = 0, **outcome: Any) -> pb.AttemptEnd:
    return pb.AttemptEnd(attempt=attempt, **outcome)


STOP = pb.ChoiceFinished(reason=pb.FINISH_REASON_STOP)


def begun(*, split: bool = True) -> Progress:
    progress = Progress()
    progress.begin(split=split)
    return progress


def test_first_token_from_either_worker_counts_once() -> None:
    for order in ((P, D), (D, P)):
        progress = begun()
        new = [list(progress.on_frame(source, frame(0, [7], cached_tokens=3)).token_ids) for source in order]
        assert new == [[7], []]
        assert (progress.emitted, progress.cached_tokens) == ([7], 3)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 5)), max_size=20))
def test_any_frames_without_a_gap_give_the_sequence(spans: list[tuple[int, int]]) -> None:
    sequence = list(range(100, 120))
    progress = begun(split=False)
    got: list[int] = []
    for start, length in spans:
        got += progress.on_frame(D, frame(start, sequence[start : start + length])).token_ids
        progress.check()
        assert got == progress.emitted == sequence[: len(got)]
        if isinstance(progress.outcome, Failed):
            assert start > len(got)
            return


def test_logprobs_follow_their_tokens() -> None:
    progress = begun(split=False)
    progress.on_frame(D, frame(0, [1]))
    logprobs = [pb.TokenLogprob(logprob=-float(index)) for index in range(3)]
    new = progress.on_frame(D, frame(0, [1, 2, 3], logprobs=logprobs))
    assert list(new.token_ids) == [2, 3]
    assert [item.logprob for item in new.logprobs] == [-1.0, -2.0]


def test_gap_and_contradiction_fail_the_attempt() -> None:
    progress = begun()
    progress.on_frame(D, frame(1, [7]))
    assert isinstance(progress.outcome, Failed)
    assert progress.outcome.error.retryable
    progress = begun()
    progress.on_frame(P, frame(0, [7]))
    progress.on_frame(D, frame(0, [8, 9]))
    assert isinstance(progress.outcome, Failed)
    assert progress.emitted == [7]


def test_older_attempts_are_dropped_and_counted() -> None:
    progress = begun()
    progress.on_frame(D, frame(0, [7]))
    progress.on_lost(D, 0, GONE)
    assert isinstance(progress.outcome, Failed)
    assert progress.begin(split=True) == 1
    assert not progress.on_frame(D, frame(1, [8])).token_ids
    assert progress.dropped_frames == 1
    progress.on_end(D, end(finished=STOP))
    progress.on_lost(D, 0, GONE)
    assert progress.outcome is None
    assert list(progress.on_frame(D, frame(1, [9], attempt=1)).token_ids) == [9]


def test_prefill_worker_matters_until_decode_spoke() -> None:
    progress = begun()
    progress.on_frame(P, frame(0, [7]))
    progress.on_lost(P, 0, GONE)
    assert isinstance(progress.outcome, Failed)
    assert progress.outcome.worker_lost
    progress = begun()
    progress.on_frame(D, frame(0, [7]))
    progress.on_lost(P, 0, GONE)
    assert progress.outcome is None
    progress = begun()
    progress.on_end(P, end(handed_over=pb.HandedOver()))
    progress.on_lost(P, 0, GONE)
    assert progress.outcome is None
    assert progress.open == {D}


def test_finish_at_token_zero_in_either_order() -> None:
    progress = begun()
    progress.on_end(D, end(finished=STOP))
    assert progress.outcome is None
    progress.on_frame(P, frame(0, [1]))
    progress.on_end(P, end(finished=STOP))
    assert progress.outcome == Finished(pb.FINISH_REASON_STOP, None)
    progress = begun()
    progress.on_end(D, end(finished=STOP))
    progress.on_frame(P, frame(0, [1]))
    progress.on_end(P, end(handed_over=pb.HandedOver()))
    assert isinstance(progress.outcome, Finished)
    progress = begun()
    progress.on_end(D, end(finished=STOP))
    progress.on_lost(P, 0, GONE)
    assert isinstance(progress.outcome, Failed)


def test_failures_keep_code_and_retryability() -> None:
    progress = begun()
    failed = pb.AttemptFailed(code=8, message="full", retryable=True)
    progress.on_end(D, end(failed=failed))
    assert isinstance(progress.outcome, Failed)
    assert isinstance(progress.outcome.error, Overloaded)
    assert progress.outcome.error.retryable
    assert not progress.outcome.worker_lost
    progress = begun()
    progress.on_end(D, end(finished=pb.ChoiceFinished(reason=pb.FINISH_REASON_ERROR)))
    assert isinstance(progress.outcome, Failed)
    assert not progress.outcome.error.retryable
