"""Beam search over the likeliest continuations of each beam: decides with numbers, holds no blocks.

It follows `generate(num_beams=..., do_sample=False)` of Hugging Face transformers step for step, so that the
same model gives the same beams: candidates are ranked by the sum of their tokens' log-probabilities; one that
ends is kept if it is among the best `width` candidates of its step, with its sum divided by
length ** length_penalty; as many others as there are beams go on.
"""

import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import NamedTuple

Alternatives = Sequence[tuple[int, float]]
"""Token ids with their log-probabilities, likeliest first."""


class EarlyStopping(Enum):
    """When a search is done, once it has as many ended beams as its width."""

    LIKELY = auto()
    """No running beam would be better if it ended now: the heuristic of transformers."""
    WHEN_ENOUGH = auto()
    """At once."""
    NEVER = auto()
    """No running beam can become better."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BeamParams:
    """What a client asks of a beam search."""

    width: int
    """Beams that run at a time."""
    num_returned: int
    """Of those that ended, the best so many are returned; at most `width`."""
    length_penalty: float = 1.0
    """Exponent of a beam's length in its score; above 0 it favours long beams."""
    early_stopping: EarlyStopping = EarlyStopping.LIKELY


class TokenScore(NamedTuple):
    """One token of a beam: its log-probability and the likeliest tokens in its place."""

    token_id: int
    logprob: float
    alternatives: Alternatives


@dataclass(frozen=True, slots=True)
class Beam:
    """A continuation of the prompt."""

    tokens: tuple[TokenScore, ...] = ()
    score: float = 0.0
    """Sum of log-probabilities while it runs; once it has ended, divided by its length's power."""

    @property
    def token_ids(self) -> list[int]:
        """Token ids behind the prompt."""
        return [token.token_id for token in self.tokens]


class Candidate(NamedTuple):
    """A running beam with one more token."""

    score: float
    parent: int
    token: TokenScore


@dataclass(kw_only=True, slots=True)
class BeamSearch:
    """The beams of one prompt. `running` is in the order in which `advance` gave them parents."""

    params: BeamParams
    max_tokens: int
    """A beam of this length has ended."""
    stop_token_ids: Collection[int]
    """A beam with one of these as its last token has ended."""
    num_logprobs: int | None = None
    """Alternatives that the client wants to see beside each token; None: not even the token's own."""
    running: list[Beam] = field(default_factory=lambda: [Beam()])
    ended: list[Beam] = field(default_factory=list)
    """Best first, at most `width`."""
    done: bool = False

    @property
    def num_candidates(self) -> int:
        """Alternatives that `advance` needs of each beam: even if all that can end do, `width` go on."""
        return max(2, 1 + len(self.stop_token_ids)) * self.params.width

    def restarted(self) -> "BeamSearch":
        """The same search before its first step."""
        return replace(self, running=[Beam()], ended=[], done=False)

    def advance(self, alternatives: Sequence[Alternatives]) -> list[int]:
        """One step, from the likeliest next tokens of each running beam.

        Returns which beam each of the new running ones continues; when `done`, nothing runs on.
        """
        assert not self.done
        candidates = self._candidates(alternatives)
        self._keep_ended(candidates[: self.params.width])
        going_on = [each for each in candidates if not self._ends(each)][: self.params.width]
        self.running = [self._extended(each) for each in going_on]
        self.done = not self.running or (len(self.ended) == self.params.width and self._is_settled())
        return [each.parent for each in going_on]

    def best(self) -> list[Beam]:
        """The beams to return, best first."""
        return self.ended[: self.params.num_returned]

    def stop_token_id(self, beam: Beam) -> int | None:
        """The token that ended a beam; None: its length did."""
        last = beam.tokens[-1].token_id
        return last if last in self.stop_token_ids else None

    def _candidates(self, alternatives: Sequence[Alternatives]) -> list[Candidate]:
        found = [
            Candidate(_fp32(beam.score + logprob), parent, TokenScore(token_id, logprob, tops))
            for parent, (beam, tops) in enumerate(zip(self.running, alternatives, strict=True))
            for token_id, logprob in tops[: self.num_candidates]
        ]
        found.sort(key=lambda each: -each.score)
        return found[: self.num_candidates]

    def _keep_ended(self, candidates: Sequence[Candidate]) -> None:
        for each in candidates:
            if self._ends(each):
                beam = self._extended(each)
                self.ended.append(Beam(beam.tokens, self._penalized(beam.score, len(beam.tokens))))
        self.ended.sort(key=lambda beam: -beam.score)
        del self.ended[self.params.width :]

    def _is_settled(self) -> bool:
        if self.params.early_stopping is EarlyStopping.WHEN_ENOUGH:
            return True
        longest = self.params.early_stopping is EarlyStopping.NEVER and self.params.length_penalty > 0
        length = self.max_tokens if longest else len(self.running[0].tokens)
        return self._penalized(self.running[0].score, length) <= self.ended[-1].score

    def _ends(self, candidate: Candidate) -> bool:
        length = len(self.running[candidate.parent].tokens) + 1
        return candidate.token.token_id in self.stop_token_ids or length >= self.max_tokens

    def _extended(self, candidate: Candidate) -> Beam:
        return Beam((*self.running[candidate.parent].tokens, candidate.token), candidate.score)

    def _penalized(self, score: float, length: int) -> float:
        return _fp32(score / _fp32(length**self.params.length_penalty))


def _fp32(value: float) -> float:
    """Rounded as transformers' sums are: near ties are decided alike."""
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded
