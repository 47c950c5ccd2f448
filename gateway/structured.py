"""Structured output over HTTP: OpenAI's `response_format`, vLLM's `structured_outputs` and `guided_*`."""

from collections.abc import Callable, Mapping
from typing import Any

import orjson

from protos.tandem.v1 import common_pb2 as pb
from runtime.errors import InvalidRequest

Value = Any
"""What stands in a JSON body."""


def structured_output(body: Mapping[str, Value]) -> tuple[str, pb.StructuredOutput] | None:
    """(the field that asks for it, what the text must match); InvalidRequest names the field."""
    found: tuple[str, pb.StructuredOutput] | None = None
    for name, parse in FIELDS.items():
        output = None if body.get(name) is None else parse(body[name], name)
        if output is None:
            continue
        if found is not None:
            raise InvalidRequest(f"{name}: {found[0]} is given, too", field=name)
        found = name, output
    return found


def _response_format(value: Value, name: str) -> pb.StructuredOutput | None:
    kind = value.get("type") if isinstance(value, dict) else None
    match kind:
        case "text":
            return None
        case "json_object":
            return pb.StructuredOutput(json_object=True)
        case "json_schema":
            schema = value.get("json_schema")
            if not isinstance(schema, dict) or schema.get("schema") is None:
                raise InvalidRequest(f"{name}.json_schema.schema is missing", field=name)
            return _json(schema["schema"], name)
        case _:
            raise InvalidRequest(f"{name}.type must be text, json_object or json_schema", field=name)


def _structured_outputs(value: Value, name: str) -> pb.StructuredOutput | None:
    if not isinstance(value, dict):
        raise InvalidRequest(f"{name} must be an object", field=name)
    given = {key: inner for key, inner in value.items() if inner is not None}
    unknown = given.keys() - CONSTRAINTS.keys()
    if unknown:
        raise InvalidRequest(f"{name}.{min(unknown)} is not supported", field=name)
    if len(given) != 1:
        raise InvalidRequest(f"{name} must have exactly one of {', '.join(CONSTRAINTS)}", field=name)
    [(key, inner)] = given.items()
    return CONSTRAINTS[key](inner, name)


def _json(value: Value, name: str) -> pb.StructuredOutput:
    if not isinstance(value, dict | str | bool):
        raise InvalidRequest(f"{name}: a JSON schema must be an object", field=name)
    if isinstance(value, str):
        return pb.StructuredOutput(json_schema=value)
    try:
        return pb.StructuredOutput(json_schema=orjson.dumps(value).decode())
    except orjson.JSONEncodeError:
        raise InvalidRequest(f"{name}: the JSON schema is nested too deeply", field=name) from None


def _json_object(value: Value, name: str) -> pb.StructuredOutput | None:
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name}: json_object must be true or false", field=name)
    return pb.StructuredOutput(json_object=True) if value else None


def _regex(value: Value, name: str) -> pb.StructuredOutput:
    return pb.StructuredOutput(regex=_text(value, name, "a regular expression"))


def _grammar(value: Value, name: str) -> pb.StructuredOutput:
    return pb.StructuredOutput(grammar=_text(value, name, "a grammar"))


def _choice(value: Value, name: str) -> pb.StructuredOutput:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise InvalidRequest(f"{name}: choices must be a list of strings", field=name)
    return pb.StructuredOutput(choice=pb.TextChoices(texts=value))


def _text(value: Value, name: str, what: str) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(f"{name}: {what} must be a string", field=name)
    return value


Parse = Callable[[Value, str], pb.StructuredOutput | None]

CONSTRAINTS: Mapping[str, Parse] = {
    "json": _json,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
    "json_object": _json_object,
}
"""Keys of `structured_outputs`."""

FIELDS: Mapping[str, Parse] = {
    "response_format": _response_format,
    "structured_outputs": _structured_outputs,
    "guided_json": _json,
    "guided_regex": _regex,
    "guided_choice": _choice,
    "guided_grammar": _grammar,
}
"""Fields of a body."""
