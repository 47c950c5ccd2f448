"""Structured output in HTTP bodies: each spelling, and what is refused by name."""

from typing import Any

import pytest

from gateway.openai import parse_chat, parse_completion
from gateway.structured import structured_output
from protos.tandem.v1 import common_pb2 as pb
from runtime.errors import InvalidRequest

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
SCHEMA_TEXT = '{"type":"object","properties":{"a":{"type":"integer"}}}'


def json_schema(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": schema}}


@pytest.mark.parametrize(
    ("field", "value", "want"),
    [
        ("response_format", json_schema(SCHEMA), {"json_schema": SCHEMA_TEXT}),
        ("response_format", {"type": "json_object"}, {"json_object": True}),
        ("structured_outputs", {"json": SCHEMA}, {"json_schema": SCHEMA_TEXT}),
        ("structured_outputs", {"json": SCHEMA_TEXT, "regex": None}, {"json_schema": SCHEMA_TEXT}),
        ("structured_outputs", {"regex": "a+"}, {"regex": "a+"}),
        ("structured_outputs", {"choice": ["a", "b"]}, {"choice": pb.TextChoices(texts=["a", "b"])}),
        ("structured_outputs", {"grammar": "start: A"}, {"grammar": "start: A"}),
        ("structured_outputs", {"json_object": True}, {"json_object": True}),
        ("guided_json", SCHEMA, {"json_schema": SCHEMA_TEXT}),
        ("guided_regex", "a+", {"regex": "a+"}),
        ("guided_choice", ["a"], {"choice": pb.TextChoices(texts=["a"])}),
        ("guided_grammar", "start: A", {"grammar": "start: A"}),
    ],
)
def test_every_spelling_on_both_endpoints(field: str, value: Any, want: dict[str, Any]) -> None:
    chat = parse_chat({"messages": [{"role": "user", "content": "x"}], field: value})
    for parsed in (parse_completion({"prompt": "x", field: value}), chat):
        assert parsed.sampling.structured_output == pb.StructuredOutput(**want)
        assert parsed.names["structured_output"] == field


@pytest.mark.parametrize("body", [{}, {"response_format": {"type": "text"}}, {"guided_json": None}])
def test_nothing_asked(body: dict[str, Any]) -> None:
    assert structured_output(body) is None
    assert not parse_completion({"prompt": "x", **body}).sampling.HasField("structured_output")


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("response_format", "json"),
        ("response_format", {}),
        ("response_format", {"type": "structural_tag"}),
        ("response_format", {"type": "json_schema"}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "a"}}),
        ("response_format", json_schema(7)),
        ("response_format", json_schema(nested(900))),
        ("structured_outputs", []),
        ("structured_outputs", {}),
        ("structured_outputs", {"json": SCHEMA, "regex": "a"}),
        ("structured_outputs", {"regex": "a", "whitespace_pattern": " "}),
        ("structured_outputs", {"regex": 7}),
        ("structured_outputs", {"choice": "ab"}),
        ("structured_outputs", {"choice": ["a", 7]}),
        ("structured_outputs", {"grammar": ["a"]}),
        ("structured_outputs", {"json_object": 1}),
        ("guided_json", 7),
        ("guided_regex", {}),
    ],
)
def test_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as raised:
        parse_completion({"prompt": "x", field: value})
    assert raised.value.field == field
    assert field in raised.value.message


def test_two_constraints_contradict() -> None:
    with pytest.raises(InvalidRequest) as raised:
        structured_output({"response_format": {"type": "json_object"}, "guided_regex": "a"})
    assert raised.value.field == "guided_regex"
