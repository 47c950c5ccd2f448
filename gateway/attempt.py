"""What a request has emitted, across its attempts. Pure: arrivals in, tokens and an outcome out.

1. `begin` opens an attempt; only its frames count from here on, older ones are dropped and counted.
2. `on_frame` returns the tokens that nobody has seen yet. In a split attempt both workers send token 0,
   in either order; a frame that would leave a gap fails the attempt.
3. `on_end` and `on_lost` lead to the end of each choice, or to `failed`. Once the decode worker has spoken
   it has the whole request, and nothing that happens to the prefill worker matters.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from protos.tandem.v1 import common_pb2 as pb
from runtime import errors
from runtime.errors import Internal, LinkFailed, TandemError, Unavailable

ERRORS_BY_CODE: dict[int, type[TandemError]] = {
    1: errors.Cancelled,
    3: errors.InvalidRequest,
    4: errors.DeadlineExceeded,
    5: errors.NotFound,
    8: errors.Overloaded,
    9: errors.Mismatch,
    10: errors.Preempted,
    14: errors.Unavailable,
}
"""By google.rpc.Code; any other is Internal."""


class Source(enum.Enum):
    """Which of an attempt's two workers is meant."""

    PREFILL = "prefill"
    DECODE = "decode"


class NewTokens(NamedTuple):
    """Tokens that the client has not seen; logprobs are empty or one each."""

    token_ids: Sequence[int]
    logprobs: Sequence[pb.TokenLogprob]

    def followed_by(self, other: "NewTokens") -> "NewTokens":
        """Both, in order."""
        return NewTokens([*self.token_ids, *other.token_ids], [*self.logprobs, *other.logprobs])


NOTHING = NewTokens((), ())


class Finished(NamedTuple):
    """A choice is complete."""

    reason: pb.FinishReason
    stop_token_id: int | None


class Failed(NamedTuple):
    """The attempt is over without a result."""

    error: TandemError
    source: Source
    worker_lost: bool
    """The worker broke down, rather than saying no."""


@dataclass(slots=True)
class ChoiceProgress:
    """One choice of the request, across attempts."""

    emitted: list[int] = field(default_factory=list)
    finished: Finished | None = None
    decode_spoke: bool = False
    """The decode worker of this attempt has sent tokens."""
    overrun: bool = False
    """The decode worker of this attempt goes on with it though it has finished."""
    early_finish: Finished | None = None
    """The decode worker's word, while token 0 is still on its way from the prefill worker."""


class DraftTokens:
    """What became of the tokens that were drafted for one request, over all of its attempts."""

    def __init__(self) -> None:
        self.accepted = 0
        self.rejected = 0

    def add(self, frame: pb.TokenFrame) -> None:
        """Count a frame's."""
        self.accepted += frame.accepted_draft_tokens
        self.rejected += frame.rejected_draft_tokens

    def write(self, usage: pb.Usage) -> None:
        """Enter the counts, if there was a draft."""
        if self.accepted or self.rejected:
            usage.accepted_prediction_tokens = self.accepted
            usage.rejected_prediction_tokens = self.rejected


class Progress:
    """The output of one request so far and the state of its current attempt."""

    def __init__(self, num_choices: int = 1) -> None:
        self.choices = [ChoiceProgress() for _ in range(num_choices)]
        self.attempt = -1
        self.cached_tokens = 0
        self.draft_tokens = DraftTokens()
        self.dropped_frames = 0
        self.failed: Failed | None = None
        """The current attempt is over without a result."""
        self._overruns: list[int] = []
        self.open: set[Source] = set()
        """Workers of this attempt that have not ended it: they must be told if it is given up."""

    @property
    def num_emitted(self) -> int:
        """Tokens of all choices."""
        return sum(len(choice.emitted) for choice in self.choices)

    @property
    def is_over(self) -> bool:
        """Nothing more comes of this attempt: it has failed, or every choice has ended."""
        if self.failed is not None:
            return True
        for choice in self.choices:  # noqa: SIM110 - once per token, and `all` costs four times as much
            if choice.finished is None:
                return False
        return True

    def begin(self, *, split: bool) -> int:
        """Open the next attempt; returns its number. `split`: a prefill worker takes part."""
        self.attempt += 1
        self.failed = None
        self.open = {Source.PREFILL, Source.DECODE} if split else {Source.DECODE}
        for choice in self.choices:
            choice.decode_spoke, choice.overrun, choice.early_finish = False, False, None
        return self.attempt

    def take_overruns(self) -> list[int]:
        """Choices that the decode worker should be told to end; each is named once in an attempt."""
        overruns, self._overruns = self._overruns, []
        return overruns

    def on_frame(self, source: Source, frame: pb.TokenFrame) -> NewTokens:
        """The unseen suffix of a frame."""
        # A field of a message costs as much as a call: each is read once.
        number, start_index = frame.choice, frame.start_index
        if frame.attempt != self.attempt or number >= len(self.choices) or self.is_over:
            self.dropped_frames += 1
            return NOTHING
        choice = self.choices[number]
        if choice.finished is not None:
            if source is Source.DECODE and not choice.overrun:
                choice.overrun = True
                self._overruns.append(number)
            return NOTHING
        num_seen = len(choice.emitted) - start_index
        if num_seen < 0:
            self._fail(source, f"a gap before token {start_index}")
            return NOTHING
        if num_seen and not _agrees(frame, choice.emitted[start_index:]):
            self._fail(source, f"other tokens at {start_index} than before")
            return NOTHING
        choice.decode_spoke = choice.decode_spoke or source is Source.DECODE
        if start_index == 0:
            self.cached_tokens = max(self.cached_tokens, frame.cached_tokens)
        if frame.accepted_draft_tokens or frame.rejected_draft_tokens:
            self.draft_tokens.add(frame)
        new = NewTokens(frame.token_ids[num_seen:], frame.logprobs[num_seen:])
        choice.emitted += new.token_ids
        return new

    def on_end(self, source: Source, end: pb.AttemptEnd) -> None:
        """A worker ended its part, or a choice."""
        if end.attempt != self.attempt or self.is_over:
            return
        match end.WhichOneof("outcome"):
            case "finished":
                self._on_finished(source, end.finished)
            case "failed":
                self.open.discard(source)
                self._on_failed(source, _to_error(end.failed), worker_lost=False)
            case _:
                self.open.discard(source)
                for choice in self.choices:
                    choice.finished = choice.finished or choice.early_finish

    def on_lost(self, source: Source, attempt: int, error: TandemError) -> None:
        """A worker of this attempt is gone, or its stream is."""
        if attempt == self.attempt and source in self.open and not self.is_over:
            self.open.discard(source)
            self._on_failed(source, error, worker_lost=True)

    def _on_finished(self, source: Source, finished: pb.ChoiceFinished) -> None:
        if finished.reason not in (pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH):
            self.open.discard(source)
            error = Internal(
                "the worker gave the request up", retryable=finished.reason == pb.FINISH_REASON_ABORT
            )
            self._on_failed(source, error, worker_lost=False)
        elif finished.choice >= len(self.choices):
            self._fail(source, f"there is no choice {finished.choice}")
        else:
            stop_token_id = finished.stop_token_id if finished.HasField("stop_token_id") else None
            self._finish(source, self.choices[finished.choice], Finished(finished.reason, stop_token_id))

    def _finish(self, source: Source, choice: ChoiceProgress, finished: Finished) -> None:
        if source is Source.DECODE and not choice.decode_spoke and Source.PREFILL in self.open:
            # Token 0 ended the choice and is still on its way from the prefill worker.
            choice.early_finish = finished
        else:
            choice.finished = choice.finished or finished

    def _on_failed(self, source: Source, error: TandemError, *, worker_lost: bool) -> None:
        if source is Source.PREFILL and any(choice.decode_spoke for choice in self.choices):
            return
        self.failed = Failed(error, source, worker_lost)

    def _fail(self, source: Source, message: str) -> None:
        self.failed = Failed(Internal(message, retryable=True), source, worker_lost=False)

    def check(self) -> None:
        """What holds between any two arrivals."""
        assert self.attempt >= -1
        assert self.attempt >= 0 or not self.is_over
        assert not any(choice.early_finish and choice.decode_spoke for choice in self.choices)


def _agrees(frame: pb.TokenFrame, seen: list[int]) -> bool:
    """Whether a frame begins with what is known of it; `seen` may be longer than the frame."""
    return list(frame.token_ids[: len(seen)]) == seen[: len(frame.token_ids)]


def _to_error(failed: pb.AttemptFailed) -> TandemError:
    cls = LinkFailed if failed.at_link else ERRORS_BY_CODE.get(failed.code, Internal)
    retry_after_s = 1.0 if cls in (errors.Overloaded, Unavailable, LinkFailed) else None
    return cls(failed.message or "the worker failed", retryable=failed.retryable, retry_after_s=retry_after_s)
