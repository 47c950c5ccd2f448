"""Every limit, at it and past it."""

from typing import Any

import pytest

from gateway.validation import UNSUPPORTED, ModelLimits, check_cache_salt, check_prompt, complete_sampling
from protos.tandem.v1 import common_pb2 as pb
from runtime.errors import ContextLengthExceeded, InvalidRequest

LIMITS = ModelLimits(max_model_len=100, vocab_size=50, defaults={"temperature": 0.5, "top_k": 7})
OPTIONAL = {"logprobs", "prompt_logprobs", "structured_output"}
NAN, INF = float("nan"), float("inf")


def complete(num_prompt_tokens: int = 10, limits: ModelLimits = LIMITS, **fields: Any) -> pb.SamplingParams:
    return complete_sampling(pb.SamplingParams(**fields), limits, num_prompt_tokens, lambda: 42)


def test_every_field_is_set() -> None:
    full = complete()
    assert (full.max_tokens, full.seed, full.temperature, full.top_k) == (90, 42, 0.5, 7)
    neutral = complete(limits=ModelLimits(max_model_len=100, vocab_size=50))
    assert (neutral.temperature, neutral.top_p, neutral.top_k, neutral.min_p) == (1, 1, 0, 0)
    assert neutral.repetition_penalty == 1
    for name in pb.SamplingParams.DESCRIPTOR.fields_by_name:
        if name not in UNSUPPORTED | OPTIONAL and neutral.DESCRIPTOR.fields_by_name[name].has_presence:
            assert neutral.HasField(name), name


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("temperature", [0, 2], [-0.001, 2.001, NAN, INF, -INF]),
        ("top_p", [1e-6, 1], [0, 1.001, NAN]),
        ("top_k", [-1, 0, 2**31 - 1], [-2]),
        ("min_p", [0, 1], [-0.1, 1.1, NAN]),
        ("typical_p", [1e-6, 1], [0, 1.001, NAN]),
        ("repetition_penalty", [0.1, 100], [0, -1, 101, INF]),
        ("presence_penalty", [-2, 2], [-2.01, 2.01, NAN]),
        ("frequency_penalty", [-2, 2], [-2.01, 2.01, NAN]),
        ("max_tokens", [1, 90], [0, 91, 2**32 - 1]),
        ("min_tokens", [0, 90], [91]),
        ("seed", [-(2**63), 0, 2**63 - 1], []),
        ("stop", [["a"] * 16, ["é" * 128]], [["a"] * 17, [""], ["é" * 128 + "a"]]),
        ("stop_token_ids", [[49], [0]], [[50], [0] * 257]),
        ("logit_bias", [{49: 100, 0: -100}], [{50: 0}, {0: 100.5}, {0: NAN}]),
        ("logprobs", [0, 20], [21]),
        ("prompt_logprobs", [0, 20], [21]),
        ("allowed_token_ids", [[49], list(range(50))], [[50], [0] * 51]),
        ("bad_words", [["a"] * 32, ["é" * 128], [" a "]], [["a"] * 33, [""], ["  "], ["é" * 128 + "a"]]),
    ],
)
def test_limits(field: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        complete(**{field: value})
    for value in bad:
        with pytest.raises(InvalidRequest) as raised:
            complete(**{field: value})
        assert raised.value.field == field
        assert field in raised.value.message


def test_context() -> None:
    assert complete(99).max_tokens == 1
    for num_prompt_tokens in (100, 1000):
        with pytest.raises(ContextLengthExceeded) as raised:
            complete(num_prompt_tokens)
        assert raised.value.field == "prompt"
    full = complete_sampling(pb.SamplingParams(), LIMITS, 95, lambda: 1, default_max_tokens=16)
    assert full.max_tokens == 5
    with pytest.raises(ContextLengthExceeded):
        complete(95, max_tokens=6)


def test_tiny_temperature_is_greedy_and_names_are_the_clients() -> None:
    assert complete(temperature=1e-9).temperature == 0
    with pytest.raises(InvalidRequest, match=r"^top_logprobs") as raised:
        complete_sampling(
            pb.SamplingParams(logprobs=21), LIMITS, 1, lambda: 1, names={"logprobs": "top_logprobs"}
        )
    assert raised.value.field == "top_logprobs"


@pytest.mark.parametrize("token_ids", [[], [50], [2**32 - 1], [-1]])
def test_prompt(token_ids: list[int]) -> None:
    with pytest.raises(InvalidRequest) as raised:
        check_prompt(token_ids, LIMITS)
    assert raised.value.field == "prompt"
    check_prompt([0, 49], LIMITS)


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_what_is_not_supported_is_refused_by_name(name: str) -> None:
    values: dict[str, Any] = {
        "structured_output": pb.StructuredOutput(json_object=True),
        "bad_words": ["x"],
        "allowed_token_ids": [1],
    }
    with pytest.raises(InvalidRequest, match=f"{name} is not supported"):
        complete(**{name: values.get(name, 1)})


def test_a_salt_has_at_most_256_bytes() -> None:
    check_cache_salt("é" * 128)
    with pytest.raises(InvalidRequest) as raised:
        check_cache_salt("é" * 128 + "a")
    assert raised.value.field == "cache_salt"
