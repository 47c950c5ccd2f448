"""What a client gets of one choice: token ids and logprobs as they come, text as soon as it is certain."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from gateway.attempt import NewTokens
from gateway.detokenizer import StopStrings, Vocabulary
from protos.tandem.v1 import common_pb2 as pb


@dataclass(slots=True, kw_only=True)
class Delta:
    """What is new since the last delta of this choice. Never changed; saying so would cost 2 µs a token."""

    choice: int = 0
    """Index of the choice."""
    token_ids: Sequence[int] = ()
    """New tokens, the final EOS or stop token included."""
    text: str = ""
    """New text; may lag behind the tokens while a character or a stop string is unfinished."""
    logprobs: Sequence[pb.TokenLogprob] = ()
    """Empty, or one for each token id."""
    finish_reason: pb.FinishReason | None = None
    """Set on the last delta of the choice."""
    stop_reason: str | int | None = None
    """On the last delta of the choice: the stop string or the requested stop token id that ended it."""
    usage: pb.Usage | None = None
    """Set on the last delta of the request."""
    prompt_token_ids: Sequence[int] = ()
    """Set on the first delta of the request."""
    prompt_logprobs: Sequence[pb.TokenLogprob] = ()
    """Set on the first delta of the request if asked for: of the prompt's tokens from the second one on."""


class Piece(NamedTuple):
    """Text and tokens of one push. `stop` ends the choice; tokens behind it are left out."""

    token_ids: Sequence[int]
    logprobs: Sequence[pb.TokenLogprob]
    text: str
    stop: str | None


class TextOutput:
    """Detokenizer and stop strings of one choice.

    Stop strings are looked for behind the first `min_tokens` tokens only. The text of the token that ends
    the generation (EOS or stop token id) is not shown unless `include_stop_str_in_output`.
    """

    def __init__(self, vocabulary: Vocabulary, sampling: pb.SamplingParams, eos_ids: Collection[int]) -> None:
        self._detokenizer = vocabulary.detokenizer()
        self._stops = StopStrings(sampling.stop)
        self._include_stop = sampling.include_stop_str_in_output
        self._min_tokens = sampling.min_tokens
        self._max_tokens = sampling.max_tokens
        self._asked_stop_ids = frozenset(sampling.stop_token_ids)
        self._eos_ids = frozenset() if sampling.ignore_eos else frozenset(eos_ids)
        self._stop_ids = self._asked_stop_ids | self._eos_ids
        self.num_tokens = 0

    def push(self, new: NewTokens) -> Piece:
        """Text that these tokens complete, up to the first stop string."""
        if len(new.token_ids) == 1:
            self.num_tokens += 1
            text, stop = self._push_token(new.token_ids[0])
            return Piece(new.token_ids, new.logprobs, text, stop)
        texts: list[str] = []
        for index, token_id in enumerate(new.token_ids):
            self.num_tokens += 1
            text, stop = self._push_token(token_id)
            texts.append(text)
            if stop is not None:
                upto = index + 1
                return Piece(new.token_ids[:upto], new.logprobs[:upto], "".join(texts), stop)
        return Piece(new.token_ids, new.logprobs, "".join(texts), None)

    def finish(self) -> tuple[str, str | None]:
        """(text that was held back, a stop string that it completes)."""
        text, stop = self._judge(self._detokenizer.finish())
        return (text, stop) if stop is not None else (text + self._stops.finish(), None)

    def stop_reason(self, stop_token_id: int | None) -> int | None:
        """The token id to report as the reason: one that the client asked for, not an EOS."""
        if stop_token_id in self._asked_stop_ids and stop_token_id not in self._eos_ids:
            return stop_token_id
        return None

    def end_at(self, token_id: int) -> pb.FinishReason | None:
        """How a generation ends with this as its latest token, as a worker judges it; None: it goes on."""
        if self._stops_at(token_id):
            return pb.FINISH_REASON_STOP
        return pb.FINISH_REASON_LENGTH if self.num_tokens >= self._max_tokens else None

    def _stops_at(self, token_id: int) -> bool:
        return token_id in self._stop_ids and self.num_tokens > self._min_tokens

    def _push_token(self, token_id: int) -> tuple[str, str | None]:
        if self._stops_at(token_id) and not self._include_stop:
            return "", None
        text = self._detokenizer.push(token_id)
        if self.num_tokens <= self._min_tokens:
            return text, None
        return self._judge(text)

    def _judge(self, text: str) -> tuple[str, str | None]:
        safe, stop = self._stops.push(text)
        if stop is not None and self._include_stop:
            return safe + stop, stop
        return safe, stop


def join(deltas: Sequence[Delta]) -> list[Delta]:
    """One delta for each choice that says what all of its deltas say; the usage is the last one's.

    Choices are in the order of their numbers; what is known of the prompt is everywhere.
    """
    by_choice: dict[int, list[Delta]] = {}
    for delta in deltas:
        by_choice.setdefault(delta.choice, []).append(delta)
    wholes = [_joined(by_choice[choice], deltas[0]) for choice in sorted(by_choice)]
    wholes[-1] = replace(wholes[-1], usage=deltas[-1].usage)
    return wholes


def _joined(deltas: Sequence[Delta], first: Delta) -> Delta:
    last = deltas[-1]
    return Delta(
        choice=last.choice,
        token_ids=[token_id for delta in deltas for token_id in delta.token_ids],
        text="".join(delta.text for delta in deltas),
        logprobs=[logprob for delta in deltas for logprob in delta.logprobs],
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        prompt_token_ids=first.prompt_token_ids,
        prompt_logprobs=first.prompt_logprobs,
    )
