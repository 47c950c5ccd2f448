"""A request as the engine sees it: token ids in, token ids out.

1. `Engine.submit` makes it WAITING; the scheduler allocates its blocks and it is PREFILLING, chunk by chunk.
2. With its last prompt token computed it has its first new token and is RUNNING: one token per step.
   A prefill-only request is HELD instead, so that its blocks can be read until `Engine.release`.
3. On the receiving side of a KV transfer it starts RESERVED: blocks are allocated, and filled from outside;
   `Engine.commit` brings the first token and makes it RUNNING.
4. A RUNNING request may lose its blocks (preemption). It is WAITING again, with all its tokens, or SWAPPED:
   its KV lies in host memory, and it is RUNNING as soon as it has blocks again.
5. FINISHED requests hold no blocks. `Engine.abort` leads here from every state.

A request may lead choices: once its prompt is computed it is FORKED, which holds nothing, and its forks are
RUNNING in its place, each a request of its own. It is FINISHED when all of them are.
"""

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto

from engine.beam_search import BeamParams, BeamSearch
from engine.block_keys import BlockKey
from engine.block_table import BlockTable
from runtime.errors import InvalidRequest
from runtime.grammars import Grammar


class FinishReason(Enum):
    """Why a generation ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class RequestState(Enum):
    """Where a request is in its life; TRANSITIONS says what may follow."""

    NEW = auto()
    WAITING = auto()
    PREFILLING = auto()
    RESERVED = auto()
    RUNNING = auto()
    SWAPPED = auto()
    HELD = auto()
    FORKED = auto()
    FINISHED = auto()


TRANSITIONS: Mapping[RequestState, frozenset[RequestState]] = {
    RequestState.NEW: frozenset(
        {RequestState.WAITING, RequestState.RESERVED, RequestState.PREFILLING, RequestState.RUNNING}
    ),
    RequestState.WAITING: frozenset({RequestState.PREFILLING, RequestState.FINISHED}),
    RequestState.PREFILLING: frozenset(
        {RequestState.RUNNING, RequestState.HELD, RequestState.FORKED, RequestState.FINISHED}
    ),
    RequestState.RESERVED: frozenset({RequestState.RUNNING, RequestState.FORKED, RequestState.FINISHED}),
    RequestState.RUNNING: frozenset({RequestState.WAITING, RequestState.SWAPPED, RequestState.FINISHED}),
    RequestState.SWAPPED: frozenset({RequestState.RUNNING, RequestState.FINISHED}),
    RequestState.HELD: frozenset({RequestState.FINISHED}),
    RequestState.FORKED: frozenset({RequestState.WAITING, RequestState.FINISHED}),
    RequestState.FINISHED: frozenset(),
}

MIN_TEMPERATURE = 1e-5
"""Below it sampling is greedy: dividing by less would leave fp32's range."""

RULES: Mapping[str, tuple[Callable[[float], bool], str]] = {
    "max_tokens": (lambda value: value >= 1, "at least 1"),
    "min_tokens": (lambda value: value >= 0, "at least 0"),
    "temperature": (lambda value: 0 <= value < math.inf, "at least 0 and finite"),
    "top_p": (lambda value: 0 < value <= 1, "in (0, 1]"),
    "top_k": (lambda value: value >= -1, "at least -1"),
    "min_p": (lambda value: 0 <= value <= 1, "in [0, 1]"),
    "typical_p": (lambda value: 0 < value <= 1, "in (0, 1]"),
    "repetition_penalty": (lambda value: 0 < value < math.inf, "greater than 0 and finite"),
    "presence_penalty": (math.isfinite, "finite"),
    "frequency_penalty": (math.isfinite, "finite"),
    "seed": (lambda value: -(2**63) <= value < 2**63, "a signed 64-bit integer"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the next token is chosen. InvalidRequest names the field that is out of range."""

    max_tokens: int
    """Most output tokens, those of earlier attempts included."""
    min_tokens: int = 0
    """End-of-sequence and stop token ids are not sampled before this many output tokens."""
    temperature: float = 1.0
    """0, and anything below MIN_TEMPERATURE, is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 or -1 keeps every token."""
    min_p: float = 0.0
    typical_p: float = 1.0
    """Locally typical sampling (Meister et al. 2022)."""
    repetition_penalty: float = 1.0
    """Counts prompt and output (Keskar et al. 2019)."""
    presence_penalty: float = 0.0
    """Counts output only."""
    frequency_penalty: float = 0.0
    """Counts output only."""
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] = ()
    """If not empty, no other token is sampled."""
    grammar: Grammar | None = None
    """What the output's text must match; a text that nothing may follow ends the request."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Token sequences that are never completed, not even one that the prompt began."""
    logprobs: int | None = None
    """Report the log-probability of each token and of this many likeliest alternatives."""
    beams: BeamParams | None = None
    """Beam search; of all other fields it obeys max_tokens, stop_token_ids, ignore_eos and logprobs."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens from the second one on."""
    edits_logits: bool = field(init=False)
    """Something changes single logits before the temperature does; all others take the fast path."""

    def __post_init__(self) -> None:
        for name, (holds, rule) in RULES.items():
            if not holds(getattr(self, name)):
                raise InvalidRequest(f"{name} must be {rule}, got {getattr(self, name)}", field=name)
        if not all(map(math.isfinite, self.logit_bias.values())):
            raise InvalidRequest("logit_bias values must be finite", field="logit_bias")
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(self, name) or 0) < 0:
                raise InvalidRequest(f"{name} must be at least 0, got {getattr(self, name)}", field=name)
        if not all(self.bad_words):
            raise InvalidRequest("bad_words: a sequence must have at least one token", field="bad_words")
        object.__setattr__(self, "edits_logits", self._edits_logits())

    @property
    def greedy(self) -> bool:
        """No noise: the likeliest token wins."""
        return self.temperature < MIN_TEMPERATURE

    @property
    def penalizes_output(self) -> bool:
        """A presence or a frequency penalty is set."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0

    def _edits_logits(self) -> bool:
        penalizes = self.penalizes_output or self.repetition_penalty != 1
        restricts = self.min_tokens > 0 or self.allowed_token_ids or self.bad_words or self.grammar
        return bool(penalizes or restricts or self.logit_bias)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of a sampled token under the unscaled, unpenalised model distribution."""

    logprob: float
    top: tuple[tuple[int, float], ...]
    """Likeliest tokens with their log-probabilities, best first; as many as were asked for."""


@dataclass(eq=False, kw_only=True, slots=True, weakref_slot=True)
class Request:
    """One sequence with its cursor and its blocks. The engine alone changes it after submission."""

    key: Hashable
    """Unique among the engine's live requests; forks have their leader's."""
    prompt_token_ids: list[int]
    sampling: SamplingParams
    output_token_ids: list[int] = field(default_factory=list)
    """May start with what earlier attempts emitted; those count for penalties and limits."""
    prefill_only: bool = False
    """Compute the prompt, sample one token, then keep the blocks until released."""
    granted: bool = True
    """Nobody else need go first for its blocks to be free again. False of a prefill-only request whose
    receiver has no room for its KV yet; see `Engine.grant`."""
    choice: int = 0
    """Index among the choices of one prompt; choices with one seed draw different noise."""
    cache_salt: bytes = b""
    """Cached blocks are shared only among requests with the same salt."""
    priority: int = 0
    """A larger one goes first, where the policy is by priority."""
    prompt_logprobs: list[TokenLogprob] | None = None
    """Of the prompt's tokens from the second one on, as far as they are computed; None if they are not asked
    for, and once they are reported."""
    num_computed_tokens: int = 0
    """Leading tokens whose KV lies in this request's blocks, or in host memory while it is SWAPPED."""
    num_cached_tokens: int = 0
    """Of these, found in a prefix cache when the blocks were allocated."""
    num_draft_computed_tokens: int = 0
    """Leading tokens whose KV of the draft model, if there is one, lies in this request's blocks."""
    forks: list["Request"] = field(default_factory=list)
    """Choices that go on from this prompt, by choice or beam; `engine.choices` makes them."""
    leader: "Request | None" = None
    """Whose fork this is."""
    search: BeamSearch | None = None
    """Of a leader: its forks are the beams of this search; `engine.beams` makes it."""
    block_tables: list[BlockTable] = field(default_factory=list)
    """One per KV group, equally long; empty while no blocks are held."""
    num_published_blocks: int = 0
    """Leading blocks of the tables that the prefix cache knows, or knew until a fault was found."""
    num_draft_published_blocks: int = 0
    """Of these, known to hold the draft's KV too."""
    block_keys: list[BlockKey] = field(default_factory=list)
    """Content keys of leading full blocks, as far as they were asked for."""
    state: RequestState = RequestState.NEW
    arrival: int = 0
    """Order of submission to this engine, from 1; the largest is the youngest."""
    transferred: bool = False
    """Its KV came from another worker, so that another worker can compute it again."""
    rank: tuple[int, int] = (0, 0)
    """Band and place within it, written by the scheduling policy alone; the smaller goes first."""
    served_s: float = 0.0
    """Seconds of the steps that it took part in since it came to its band."""
    served_at: float = 0.0
    """Clock seconds of its last step, or of its arrival."""

    @property
    def num_tokens(self) -> int:
        """Length of the sequence: prompt and output."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_seats(self) -> int:
        """Requests that will run in its place."""
        return max(len(self.forks), 1)

    @property
    def live_forks(self) -> list["Request"]:
        """Forks that have begun and not ended."""
        return [fork for fork in self.forks if fork.state not in (RequestState.NEW, RequestState.FINISHED)]

    @property
    def samplers(self) -> list["Request"]:
        """Whose next tokens follow this sequence: itself, or those of its choices that have none yet."""
        if self.search is not None or not self.forks:
            return [self]
        return [fork for fork in self.forks if not fork.output_token_ids]

    def tokens(self, start: int, end: int) -> list[int]:
        """Token ids of positions start..end-1 of the sequence."""
        num_prompt = len(self.prompt_token_ids)
        if end <= num_prompt:
            return self.prompt_token_ids[start:end]
        if start >= num_prompt:
            return self.output_token_ids[start - num_prompt : end - num_prompt]
        return self.prompt_token_ids[start:] + self.output_token_ids[: end - num_prompt]

    def move(self, state: RequestState) -> None:
        """The only place where the state changes."""
        assert state in TRANSITIONS[self.state], f"{self.key!r}: {self.state.name} -> {state.name}"
        self.state = state
