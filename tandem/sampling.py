"""How the next token is chosen, as a user writes it, and its conversion to the wire."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from protos.tandem.v1 import common_pb2


class StructuredOutput(TypedDict, total=False):
    """What the text must match, by exactly one key."""

    json: str | Mapping[str, Any]
    """A JSON schema."""
    json_object: bool
    """True: any JSON object."""
    regex: str
    grammar: str
    """A context-free grammar in Lark's or GBNF's notation."""
    choice: Sequence[str]
    """One of these texts."""


class Sampling(TypedDict, total=False):
    """Fields of SamplingParams; what is left out takes the server's default for the model."""

    max_tokens: int
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    typical_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    include_stop_str_in_output: bool
    logit_bias: Mapping[int, float]
    allowed_token_ids: Sequence[int]
    bad_words: Sequence[str]
    logprobs: int
    prompt_logprobs: int
    n: int
    best_of: int
    use_beam_search: bool
    length_penalty: float
    early_stopping: bool | Literal["never"]
    structured_output: StructuredOutput


EARLY_STOPPING = {
    False: common_pb2.EARLY_STOPPING_UNSPECIFIED,
    True: common_pb2.EARLY_STOPPING_WHEN_ENOUGH,
    "never": common_pb2.EARLY_STOPPING_NEVER,
}


def sampling_params(sampling: Sampling) -> common_pb2.SamplingParams:
    """The wire's form; TypeError for a name that it does not know, ValueError for a value of a wrong type."""
    unknown = sampling.keys() - Sampling.__annotations__.keys()
    if unknown:
        raise TypeError(f"unknown sampling parameter: {', '.join(sorted(unknown))}")
    fields: dict[str, Any] = {name: value for name, value in sampling.items() if value is not None}
    if isinstance(fields.get("stop"), str):
        fields["stop"] = [fields["stop"]]
    if "early_stopping" in fields:
        fields["early_stopping"] = _early_stopping(fields["early_stopping"])
    if "structured_output" in fields:
        fields["structured_output"] = _structured_output(fields["structured_output"])
    return common_pb2.SamplingParams(**fields)


def _early_stopping(value: object) -> common_pb2.EarlyStopping:
    if value not in EARLY_STOPPING:
        raise ValueError(f"early_stopping must be True, False or 'never', got {value!r}")
    return EARLY_STOPPING[value]


def _structured_output(value: StructuredOutput) -> common_pb2.StructuredOutput:
    known = StructuredOutput.__annotations__.keys()
    if len(value) != 1 or not value.keys() <= known:
        raise ValueError(f"structured_output must have exactly one of {', '.join(sorted(known))}")
    fields: dict[str, Any] = dict(value)
    if "json" in fields:
        schema = fields.pop("json")
        fields["json_schema"] = schema if isinstance(schema, str) else json.dumps(schema)
    if "choice" in fields:
        fields["choice"] = common_pb2.TextChoices(texts=fields["choice"])
    return common_pb2.StructuredOutput(**fields)
