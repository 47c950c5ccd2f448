"""Bodies of the OpenAI-compatible API, from JSON to what `flow` takes.

Every field is obeyed, accepted because it changes nothing, or refused by name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from gateway.prompts import Messages, check_num_messages
from gateway.structured import FIELDS as STRUCTURED_FIELDS
from gateway.structured import structured_output
from protos.tandem.v1 import common_pb2 as pb
from runtime.errors import InvalidRequest

Body = dict[str, Any]

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default of max_tokens for /v1/completions."""

UINT32 = (0, 2**32 - 1)
INT32 = (-(2**31), 2**31 - 1)
INT64 = (-(2**63), 2**63 - 1)

INT_FIELDS: Mapping[str, tuple[int, int]] = {
    "max_tokens": UINT32,
    "min_tokens": UINT32,
    "prompt_logprobs": UINT32,
    "top_k": INT32,
    "seed": INT64,
    "n": UINT32,
    "best_of": UINT32,
}
FLOAT_FIELDS = (
    "temperature",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "length_penalty",
)
BOOL_FIELDS = ("ignore_eos", "include_stop_str_in_output", "use_beam_search")

EARLY_STOPPING: Mapping[Any, pb.EarlyStopping] = {
    False: pb.EARLY_STOPPING_UNSPECIFIED,
    True: pb.EARLY_STOPPING_WHEN_ENOUGH,
    "never": pb.EARLY_STOPPING_NEVER,
}
"""As in transformers."""

COMMON_FIELDS = frozenset(
    {*INT_FIELDS, *FLOAT_FIELDS, *BOOL_FIELDS}
    | {"model", "stream", "stream_options", "stop", "stop_token_ids", "logit_bias", "logprobs"}
    | {"early_stopping"}
    | {*STRUCTURED_FIELDS, "allowed_token_ids", "bad_words", "return_token_ids", "request_id", "priority"}
    | {"cache_salt"}
)

HARMLESS_FIELDS = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
    | {"prompt_cache_retention", "parallel_tool_calls"}
)
"""Accepted: they do not change the output."""

ONLY_VALUES: Mapping[str, tuple[Any, ...]] = {
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
}
"""Known fields of which only the neutral values are supported."""


@dataclass(frozen=True, kw_only=True)
class ApiRequest:
    """One body, checked for types; ranges are checked where the model is known."""

    kind: Literal["completion", "chat"]
    """Which of the two shapes the answer has."""
    prompt: str | list[int] | Messages
    """What to continue."""
    sampling: pb.SamplingParams
    """As asked."""
    model: str | None = None
    """Name of the model."""
    stream: bool = False
    """Server-sent events instead of one body."""
    include_usage: bool = False
    """A last chunk with the usage."""
    return_token_ids: bool = False
    """Token ids beside the text, as in vLLM."""
    request_id: str | None = None
    """vLLM's field; the header X-Request-Id goes first."""
    priority: int = 0
    """The larger goes first, as in the gRPC API; vLLM's field has the opposite sign."""
    cache_salt: str = ""
    """vLLM's: cached KV is shared only within one salt."""
    default_max_tokens: int | None = None
    """For an unset max_tokens."""
    names: Mapping[str, str] = field(default_factory=dict)
    """What this API calls fields of SamplingParams, where it differs."""


def parse_completion(body: Body) -> ApiRequest:
    """A body of /v1/completions; InvalidRequest names the field."""
    _check_fields(body, COMMON_FIELDS | {"prompt"})
    sampling, names = _sampling(body)
    if (logprobs := _int(body, "logprobs", UINT32)) is not None:
        sampling.logprobs = logprobs
    return ApiRequest(
        kind="completion",
        prompt=_prompt(body),
        sampling=sampling,
        default_max_tokens=DEFAULT_COMPLETION_TOKENS,
        names=names,
        **_common(body),
    )


def parse_chat(body: Body) -> ApiRequest:
    """A body of /v1/chat/completions; InvalidRequest names the field."""
    _check_fields(body, COMMON_FIELDS | {"messages", "max_completion_tokens", "top_logprobs"})
    names = {"prompt": "messages", "logprobs": "top_logprobs"}
    if body.get("max_completion_tokens") is not None:
        names["max_tokens"] = "max_completion_tokens"
        body = body | {"max_tokens": _int(body, "max_completion_tokens", UINT32)}
    sampling, structured_names = _sampling(body)
    names |= structured_names
    top_logprobs = _int(body, "top_logprobs", UINT32)
    if _bool(body, "logprobs"):
        sampling.logprobs = top_logprobs or 0
    elif top_logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true", field="top_logprobs")
    return ApiRequest(kind="chat", prompt=messages(body), sampling=sampling, names=names, **_common(body))


def messages(body: Body) -> Messages:
    """`messages` as roles and texts; content parts other than text are refused."""
    items = body.get("messages")
    if not isinstance(items, list) or not items:
        raise InvalidRequest("messages must be a list with at least one message", field="messages")
    check_num_messages(len(items))
    return tuple(_message(item, f"messages[{index}]") for index, item in enumerate(items))


def get_text(body: Body, name: str) -> str | None:
    """An optional string."""
    value: str | None = _typed(body, name, str, "a string")
    return value


def get_bool(body: Body, name: str, *, default: bool) -> bool:
    """A boolean with a default."""
    value = _bool(body, name)
    return default if value is None else value


def get_token_ids(body: Body, name: str) -> list[int]:
    """A list of token ids; its ids are checked against the vocabulary later."""
    value = body.get(name)
    if not isinstance(value, list) or not all(_is_int(item, UINT32) for item in value):
        raise InvalidRequest(f"{name} must be a list of token ids", field=name)
    return value


def _common(body: Body) -> dict[str, Any]:
    options = _typed(body, "stream_options", dict, "an object") or {}
    return {
        "model": get_text(body, "model"),
        "stream": get_bool(body, "stream", default=False),
        "include_usage": get_bool(options, "include_usage", default=False),
        "return_token_ids": get_bool(body, "return_token_ids", default=False),
        "request_id": get_text(body, "request_id"),
        "priority": _int(body, "priority", INT32) or 0,
        "cache_salt": _cache_salt(body),
    }


def _cache_salt(body: Body) -> str:
    """Empty is refused, as in vLLM: who has lost their tenant's name must not share with everybody."""
    salt = get_text(body, "cache_salt")
    if salt == "":
        raise InvalidRequest("cache_salt must not be empty", field="cache_salt")
    return salt or ""


def _check_fields(body: Body, known: frozenset[str]) -> None:
    for name, value in body.items():
        if name in known or name in HARMLESS_FIELDS or value is None:
            continue
        if name not in ONLY_VALUES:
            raise InvalidRequest(f"unknown field {name!r}", field=name)
        if not any(type(value) is type(only) and value == only for only in ONLY_VALUES[name]):
            raise InvalidRequest(f"this value of {name!r} is not supported", field=name)


def _sampling(body: Body) -> tuple[pb.SamplingParams, dict[str, str]]:
    """(sampling, what the body calls its fields where it has several names for one)."""
    sampling = pb.SamplingParams()
    for name, bounds in INT_FIELDS.items():
        if (number := _int(body, name, bounds)) is not None:
            setattr(sampling, name, number)
    for name in FLOAT_FIELDS:
        if (value := _float(body, name)) is not None:
            setattr(sampling, name, value)
    for name in BOOL_FIELDS:
        setattr(sampling, name, get_bool(body, name, default=False))
    sampling.early_stopping = _early_stopping(body)
    sampling.stop.extend(_stops(body))
    if body.get("stop_token_ids") is not None:
        sampling.stop_token_ids.extend(get_token_ids(body, "stop_token_ids"))
    for token_id, bias in _logit_bias(body).items():
        sampling.logit_bias[token_id] = bias
    if body.get("allowed_token_ids") is not None:
        sampling.allowed_token_ids.extend(_allowed_token_ids(body))
    sampling.bad_words.extend(_bad_words(body))
    if sampling.HasField("prompt_logprobs") and body.get("stream"):
        raise InvalidRequest("prompt_logprobs cannot be streamed", field="prompt_logprobs")
    structured = structured_output(body)
    if structured is None:
        return sampling, {}
    sampling.structured_output.CopyFrom(structured[1])
    return sampling, {"structured_output": structured[0]}


def _early_stopping(body: Body) -> pb.EarlyStopping:
    value = body.get("early_stopping")
    for known, rule in EARLY_STOPPING.items():
        if type(value) is type(known) and value == known:
            return rule
    if value is not None:
        raise InvalidRequest('early_stopping must be true, false or "never"', field="early_stopping")
    return pb.EARLY_STOPPING_UNSPECIFIED


def _prompt(body: Body) -> str | list[int]:
    value = body.get("prompt")
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise InvalidRequest("prompt must be a string or a list of token ids", field="prompt")
    if value and all(isinstance(item, str | list) for item in value):
        if len(value) > 1:
            raise InvalidRequest("prompt: one prompt per request is supported", field="prompt")
        return _prompt({"prompt": value[0]})
    return get_token_ids(body, "prompt")


def _message(item: Any, where: str) -> Mapping[str, str]:
    if not isinstance(item, dict):
        raise InvalidRequest(f"{where} must be an object", field=where)
    for name, value in item.items():
        # Clients send an assistant's answer back with all of its empty fields.
        if name not in ("role", "content", "name") and value not in (None, [], ""):
            raise InvalidRequest(f"{where}.{name} is not supported", field=f"{where}.{name}")
    role = item.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidRequest(f"{where}.role must be a string", field=f"{where}.role")
    message = {"role": role, "content": _content(item.get("content"), f"{where}.content")}
    if isinstance(item.get("name"), str):
        message["name"] = item["name"]
    return message


def _content(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise InvalidRequest(f"{where} must be a string or a list of text parts", field=where)
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise InvalidRequest(f"{where}: only parts of type text are supported", field=where)
        texts.append(part["text"])
    return "\n".join(texts)


def _stops(body: Body) -> list[str]:
    value = body.get("stop")
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise InvalidRequest("stop must be a string or a list of strings", field="stop")
    return stops


def _allowed_token_ids(body: Body) -> list[int]:
    token_ids = get_token_ids(body, "allowed_token_ids")
    if not token_ids:
        raise InvalidRequest("allowed_token_ids must not be empty", field="allowed_token_ids")
    return token_ids


def _bad_words(body: Body) -> list[str]:
    words = _typed(body, "bad_words", list, "a list of strings") or []
    if not all(isinstance(word, str) for word in words):
        raise InvalidRequest("bad_words must be a list of strings", field="bad_words")
    return words


def _logit_bias(body: Body) -> dict[int, float]:
    value = _typed(body, "logit_bias", dict, "an object") or {}
    bias = {}
    for key in value:
        if not (key.isascii() and key.isdigit() and len(key) <= 9):
            raise InvalidRequest(f"logit_bias: {key!r} is not a token id", field="logit_bias")
        bias[int(key)] = _float(value, key, "logit_bias") or 0.0
    return bias


def _int(body: Body, name: str, bounds: tuple[int, int]) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"{name} must be an integer", field=name)
    if not _is_int(value, bounds):
        raise InvalidRequest(f"{name} must be in [{bounds[0]}, {bounds[1]}], got {value}", field=name)
    return value


def _is_int(value: Any, bounds: tuple[int, int]) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and bounds[0] <= value <= bounds[1]


def _float(body: Body, name: str, field_name: str | None = None) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest(f"{field_name or name} must be a number", field=field_name or name)
    return float(value)


def _bool(body: Body, name: str) -> bool | None:
    value: bool | None = _typed(body, name, bool, "true or false")
    return value


def _typed(body: Body, name: str, type_: Callable[..., Any], what: str) -> Any:
    value = body.get(name)
    if value is not None and type(value) is not type_:
        raise InvalidRequest(f"{name} must be {what}", field=name)
    return value
