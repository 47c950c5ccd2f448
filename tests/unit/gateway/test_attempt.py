"""Merging frames of two workers and of several attempts."""

from collections.abc import Sequence
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.attempt import Finished, Progress, Source
from gateway.openai_answer import usage_json
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
        assert (progress.choices[0].emitted, progress.cached_tokens) == ([7], 3)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 5)), max_size=20))
def test_any_frames_without_a_gap_give_the_sequence(spans: list[tuple[int, int]]) -> None:
    sequence = list(range(100, 120))
    progress = begun(split=False)
    got: list[int] = []
    for start, length in spans:
        got += progress.on_frame(D, frame(start, sequence[start : start + length])).token_ids
        progress.check()
        assert got == progress.choices[0].emitted == sequence[: len(got)]
        if progress.failed is not None:
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
    assert progress.failed is not None
    assert progress.failed.error.retryable
    progress = begun()
    progress.on_frame(P, frame(0, [7]))
    progress.on_frame(D, frame(0, [8, 9]))
    assert progress.failed is not None
    assert progress.choices[0].emitted == [7]


def test_older_attempts_are_dropped_and_counted() -> None:
    progress = begun()
    progress.on_frame(D, frame(0, [7]))
    progress.on_lost(D, 0, GONE)
    assert progress.failed is not None
    assert progress.begin(split=True) == 1
    assert not progress.on_frame(D, frame(1, [8])).token_ids
    assert progress.dropped_frames == 1
    progress.on_end(D, end(finished=STOP))
    progress.on_lost(D, 0, GONE)
    assert not progress.is_over
    assert list(progress.on_frame(D, frame(1, [9], attempt=1)).token_ids) == [9]


def test_prefill_worker_matters_until_decode_spoke() -> None:
    progress = begun()
    progress.on_frame(P, frame(0, [7]))
    progress.on_lost(P, 0, GONE)
    assert progress.failed is not None
    assert progress.failed.worker_lost
    progress = begun()
    progress.on_frame(D, frame(0, [7]))
    progress.on_lost(P, 0, GONE)
    assert not progress.is_over
    progress = begun()
    progress.on_end(P, end(handed_over=pb.HandedOver()))
    progress.on_lost(P, 0, GONE)
    assert not progress.is_over
    assert progress.open == {D}


def test_finish_at_token_zero_in_either_order() -> None:
    progress = begun()
    progress.on_end(D, end(finished=STOP))
    assert not progress.is_over
    progress.on_frame(P, frame(0, [1]))
    progress.on_end(P, end(finished=STOP))
    assert progress.choices[0].finished == Finished(pb.FINISH_REASON_STOP, None)
    progress = begun()
    progress.on_end(D, end(finished=STOP))
    progress.on_frame(P, frame(0, [1]))
    progress.on_end(P, end(handed_over=pb.HandedOver()))
    assert progress.choices[0].finished is not None
    progress = begun()
    progress.on_end(D, end(finished=STOP))
    progress.on_lost(P, 0, GONE)
    assert progress.failed is not None


def test_failures_keep_code_and_retryability() -> None:
    progress = begun()
    failed = pb.AttemptFailed(code=8, message="full", retryable=True)
    progress.on_end(D, end(failed=failed))
    assert progress.failed is not None
    assert isinstance(progress.failed.error, Overloaded)
    assert progress.failed.error.retryable
    assert not progress.failed.worker_lost
    progress = begun()
    progress.on_end(D, end(finished=pb.ChoiceFinished(reason=pb.FINISH_REASON_ERROR)))
    assert progress.failed is not None
    assert not progress.failed.error.retryable


def of_choice(choice: int, *token_ids: int, start: int = 0) -> pb.TokenFrame:
    return frame(start, token_ids, choice=choice)


def finished(choice: int) -> pb.AttemptEnd:
    return end(finished=pb.ChoiceFinished(choice=choice, reason=pb.FINISH_REASON_LENGTH))


def test_choices_go_and_end_apart() -> None:
    progress = Progress(num_choices=3)
    progress.begin(split=True)
    for choice in range(3):
        assert progress.on_frame(P, of_choice(choice, 7 + choice)).token_ids == [7 + choice]
    progress.on_end(P, finished(1))
    assert not progress.is_over
    assert progress.on_frame(D, of_choice(0, 7, 20)).token_ids == [20]
    assert not progress.on_frame(D, of_choice(1, 8)).token_ids
    progress.on_end(D, finished(1))
    progress.on_end(D, finished(0))
    assert not progress.is_over
    progress.on_frame(D, of_choice(2, 9, 30))
    progress.on_end(D, finished(2))
    assert progress.is_over
    assert [choice.emitted for choice in progress.choices] == [[7, 20], [8], [9, 30]]
    assert progress.dropped_frames == 0


def test_a_choice_that_the_worker_goes_on_with_is_named_once_an_attempt() -> None:
    progress = Progress(num_choices=2)
    for attempt in range(2):
        progress.begin(split=True)
        progress.choices[1].finished = Finished(pb.FINISH_REASON_STOP, None)
        progress.on_frame(P, pb.TokenFrame(attempt=attempt, choice=1, token_ids=[8]))
        assert progress.take_overruns() == []
        for start in range(2):
            progress.on_frame(D, pb.TokenFrame(attempt=attempt, choice=1, start_index=start, token_ids=[8]))
        assert progress.take_overruns() == [1]
        assert progress.take_overruns() == []


def test_a_choice_that_ended_stays_ended_over_attempts() -> None:
    progress = Progress(num_choices=2)
    progress.begin(split=False)
    progress.on_frame(D, of_choice(0, 7))
    progress.on_frame(D, of_choice(1, 8))
    progress.on_end(D, finished(0))
    progress.on_lost(D, 0, GONE)
    assert progress.failed is not None
    progress.begin(split=False)
    assert not progress.is_over
    again = pb.TokenFrame(attempt=1, choice=1, start_index=1, token_ids=[9])
    assert progress.on_frame(D, again).token_ids == [9]
    last = pb.ChoiceFinished(choice=1, reason=pb.FINISH_REASON_STOP)
    progress.on_end(D, end(attempt=1, finished=last))
    assert progress.is_over
    assert progress.failed is None


def test_early_ends_of_choices_wait_for_the_prefill_worker() -> None:
    progress = Progress(num_choices=2)
    progress.begin(split=True)
    progress.on_end(D, finished(0))
    progress.on_end(D, finished(1))
    assert not progress.is_over
    progress.on_frame(P, of_choice(0, 7))
    progress.on_frame(P, of_choice(1, 8))
    progress.on_end(P, finished(0))
    progress.on_end(P, end(handed_over=pb.HandedOver()))
    assert progress.is_over


def test_an_unknown_choice_is_dropped_or_fails_the_attempt() -> None:
    progress = begun()
    assert not progress.on_frame(D, of_choice(1, 7)).token_ids
    progress.on_end(D, finished(1))
    assert progress.failed is not None


def test_draft_tokens_are_counted_over_all_attempts():
    progress, usage = Progress(), pb.Usage()
    progress.draft_tokens.write(usage)
    assert not usage.HasField("accepted_prediction_tokens")
    for attempt, (start, tokens, accepted, rejected) in enumerate([(0, [1, 2, 3], 2, 1), (3, [4], 0, 4)]):
        progress.begin(split=False)
        counts = {"accepted_draft_tokens": accepted, "rejected_draft_tokens": rejected}
        progress.on_frame(D, frame(start, tokens, attempt, **counts))
    progress.draft_tokens.write(usage)
    assert (usage.accepted_prediction_tokens, usage.rejected_prediction_tokens) == (2, 5)
    assert usage_json(usage)["completion_tokens_details"] == {
        "accepted_prediction_tokens": 2,
        "rejected_prediction_tokens": 5,
    }
