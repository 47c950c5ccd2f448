"""What a client may ask of sampling: ranges, limits, defaults. Pure.

A field that changes the output is either obeyed or refused by name, never ignored.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from gateway.choice_limits import complete_choices
from gateway.limits import (
    MAX_BAD_WORD_BYTES,
    MAX_BAD_WORDS,
    MAX_CACHE_SALT_BYTES,
    MAX_GRAMMAR_BYTES,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_STOP_BYTES,
    MAX_STOP_TOKEN_IDS,
    MAX_STOPS,
)
from protos.tandem.v1 import common_pb2 as pb
from runtime.errors import ContextLengthExceeded, InvalidRequest

GREEDY_BELOW = 1e-4
"""A positive temperature under this is greedy: logits divided by it would overflow."""


@dataclass(frozen=True, kw_only=True)
class FloatRange:
    """A closed range of finite numbers; `low_open` excludes the lower end."""

    low: float
    high: float
    neutral: float
    """Taken when neither client nor checkpoint says anything."""
    low_open: bool = False

    def check(self, value: float, name: str) -> None:
        """Raise InvalidRequest naming the field unless the value is finite and inside."""
        too_low = value <= self.low if self.low_open else value < self.low
        if not math.isfinite(value) or too_low or value > self.high:
            bracket = "(" if self.low_open else "["
            raise InvalidRequest(
                f"{name} must be in {bracket}{self.low:g}, {self.high:g}], got {value:g}", field=name
            )


FLOAT_RANGES: Mapping[str, FloatRange] = {
    "temperature": FloatRange(low=0, high=2, neutral=1),
    "top_p": FloatRange(low=0, high=1, neutral=1, low_open=True),
    "min_p": FloatRange(low=0, high=1, neutral=0),
    "typical_p": FloatRange(low=0, high=1, neutral=1, low_open=True),
    "repetition_penalty": FloatRange(low=0, high=100, neutral=1, low_open=True),
    "presence_penalty": FloatRange(low=-2, high=2, neutral=0),
    "frequency_penalty": FloatRange(low=-2, high=2, neutral=0),
}

LOGIT_BIAS_RANGE = FloatRange(low=-100, high=100, neutral=0)


@dataclass(frozen=True, kw_only=True)
class ModelLimits:
    """What the served model allows."""

    max_model_len: int
    """Prompt plus output in tokens."""
    vocab_size: int
    """Token ids are below this."""
    defaults: Mapping[str, float] = field(default_factory=dict)
    """Sampling defaults of generation_config.json, by field of SamplingParams."""


def complete_sampling(
    asked: pb.SamplingParams,
    limits: ModelLimits,
    num_prompt_tokens: int,
    draw_seed: Callable[[], int],
    *,
    default_max_tokens: int | None = None,
    names: Mapping[str, str] | None = None,
) -> pb.SamplingParams:
    """The sampling that workers get: every field set and in range.

    `default_max_tokens` stands in for an unset max_tokens where the API has a fixed default. Raises
    InvalidRequest naming the field as in `names`.
    """
    with client_names(names or {}):
        return _complete(asked, limits, num_prompt_tokens, draw_seed, default_max_tokens)


@contextmanager
def client_names(names: Mapping[str, str]) -> Iterator[None]:
    """InvalidRequest names fields as the client knows them: `names` maps a field to the client's name."""
    try:
        yield
    except InvalidRequest as error:
        known_as = names.get(error.field or "")
        if known_as is None or error.field is None:
            raise
        message = error.message
        if message.startswith(error.field):
            message = known_as + message.removeprefix(error.field)
        raise type(error)(message, field=known_as) from None


def _complete(
    asked: pb.SamplingParams,
    limits: ModelLimits,
    num_prompt_tokens: int,
    draw_seed: Callable[[], int],
    default_max_tokens: int | None,
) -> pb.SamplingParams:
    full = pb.SamplingParams()
    full.CopyFrom(asked)
    full.max_tokens = _max_tokens(asked, limits, num_prompt_tokens, default_max_tokens)
    _check_min_tokens(full)
    for name, range_ in FLOAT_RANGES.items():
        value = getattr(asked, name) if asked.HasField(name) else limits.defaults.get(name, range_.neutral)
        range_.check(value, name)
        setattr(full, name, value)
    if full.temperature < GREEDY_BELOW:
        full.temperature = 0.0
    full.top_k = _top_k(asked, limits)
    if not asked.HasField("seed"):
        full.seed = draw_seed()
    _check_stops(full.stop)
    _check_token_ids(full.stop_token_ids, limits.vocab_size, "stop_token_ids", MAX_STOP_TOKEN_IDS)
    _check_logit_bias(full.logit_bias, limits.vocab_size)
    _check_token_ids(full.allowed_token_ids, limits.vocab_size, "allowed_token_ids", limits.vocab_size)
    _check_bad_words(full.bad_words)
    _check_logprobs(full, "logprobs")
    _check_logprobs(full, "prompt_logprobs")
    if full.HasField("structured_output"):
        _check_structured(full.structured_output)
    complete_choices(asked, full)
    return full


def _max_tokens(
    asked: pb.SamplingParams, limits: ModelLimits, num_prompt_tokens: int, default: int | None
) -> int:
    left = limits.max_model_len - num_prompt_tokens
    if left < 1:
        raise ContextLengthExceeded(
            f"the prompt has {num_prompt_tokens} tokens; the model's context of {limits.max_model_len} "
            "leaves no room for output",
            field="prompt",
        )
    if not asked.HasField("max_tokens"):
        return left if default is None else min(default, left)
    if asked.max_tokens < 1:
        raise InvalidRequest("max_tokens must be at least 1", field="max_tokens")
    if asked.max_tokens > left:
        raise ContextLengthExceeded(
            f"max_tokens of {asked.max_tokens} and a prompt of {num_prompt_tokens} tokens exceed the model's "
            f"context of {limits.max_model_len} tokens",
            field="max_tokens",
        )
    return asked.max_tokens


def _check_min_tokens(full: pb.SamplingParams) -> None:
    if full.min_tokens > full.max_tokens:
        raise InvalidRequest(
            f"min_tokens must be at most max_tokens ({full.max_tokens}), got {full.min_tokens}",
            field="min_tokens",
        )


def _top_k(asked: pb.SamplingParams, limits: ModelLimits) -> int:
    top_k = asked.top_k if asked.HasField("top_k") else int(limits.defaults.get("top_k", 0))
    if top_k < -1:
        raise InvalidRequest(f"top_k must be -1, 0 (both: every token) or more, got {top_k}", field="top_k")
    return min(max(top_k, 0), limits.vocab_size)


def _check_stops(stops: Sequence[str]) -> None:
    if len(stops) > MAX_STOPS:
        raise InvalidRequest(f"stop: at most {MAX_STOPS} strings, got {len(stops)}", field="stop")
    for stop in stops:
        if not 1 <= len(stop.encode()) <= MAX_STOP_BYTES:
            raise InvalidRequest(f"stop: a string must have 1 to {MAX_STOP_BYTES} bytes", field="stop")


def _check_bad_words(words: Sequence[str]) -> None:
    if len(words) > MAX_BAD_WORDS:
        raise InvalidRequest(f"bad_words: at most {MAX_BAD_WORDS} words, got {len(words)}", field="bad_words")
    for word in words:
        if not word.strip() or len(word.encode()) > MAX_BAD_WORD_BYTES:
            raise InvalidRequest(
                f"bad_words: a word must have 1 to {MAX_BAD_WORD_BYTES} bytes, not only spaces",
                field="bad_words",
            )


def _check_logprobs(full: pb.SamplingParams, name: str) -> None:
    if full.HasField(name) and getattr(full, name) > MAX_LOGPROBS:
        raise InvalidRequest(f"{name} must be at most {MAX_LOGPROBS}, got {getattr(full, name)}", field=name)


def _check_structured(output: pb.StructuredOutput) -> None:
    """Sizes alone; whether it is a grammar at all is for `grammar_check`."""
    name = "structured_output"
    kind = output.WhichOneof("constraint")
    if kind is None or (kind == "json_object" and not output.json_object):
        raise InvalidRequest(f"{name}: no constraint is set", field=name)
    if output.ByteSize() > MAX_GRAMMAR_BYTES:
        raise InvalidRequest(f"{name}: at most {MAX_GRAMMAR_BYTES} bytes", field=name)
    if kind == "choice" and not (output.choice.texts and all(output.choice.texts)):
        raise InvalidRequest(f"{name}: choices must be texts with at least one character", field=name)


def _check_token_ids(token_ids: Sequence[int], vocab_size: int, name: str, max_ids: int) -> None:
    if len(token_ids) > max_ids:
        raise InvalidRequest(f"{name}: at most {max_ids} token ids, got {len(token_ids)}", field=name)
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
        bad = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
        raise InvalidRequest(
            f"{name}: token id {bad} is outside the vocabulary (0 to {vocab_size - 1})", field=name
        )


def _check_logit_bias(bias: Mapping[int, float], vocab_size: int) -> None:
    if len(bias) > MAX_LOGIT_BIAS:
        raise InvalidRequest(f"logit_bias: at most {MAX_LOGIT_BIAS} token ids", field="logit_bias")
    _check_token_ids(sorted(bias), vocab_size, "logit_bias", MAX_LOGIT_BIAS)
    for value in bias.values():
        LOGIT_BIAS_RANGE.check(value, "logit_bias")


def check_prompt(token_ids: Sequence[int], limits: ModelLimits, name: str = "prompt") -> None:
    """A prompt that a worker can take: not empty and inside the vocabulary. `name` is the field's."""
    if not token_ids:
        raise InvalidRequest(f"{name} must not be empty", field=name)
    _check_token_ids(token_ids, limits.vocab_size, name, len(token_ids))


def check_cache_salt(salt: str) -> None:
    """A salt is hashed with every block: InvalidRequest if it is long."""
    if len(salt.encode()) > MAX_CACHE_SALT_BYTES:
        raise InvalidRequest(f"cache_salt must have at most {MAX_CACHE_SALT_BYTES} bytes", field="cache_salt")
