"""Every limit, at it and past it."""

from typing import Any

import pytest

from gateway.validation import ModelLimits, check_cache_salt, check_prompt, complete_sampling
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
        if name not in OPTIONAL and neutral.DESCRIPTOR.fields_by_name[name].has_presence:
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


def test_choices_have_limits_and_defaults() -> None:
    assert (complete().n, complete().best_of) == (1, 1)
    assert (complete(n=3).n, complete(n=3).best_of) == (3, 3)
    assert not complete(n=3).HasField("logprobs")
    ranked = complete(n=2, best_of=8)
    assert (ranked.best_of, ranked.logprobs) == (8, 0)
    assert complete(n=2, best_of=8, logprobs=4).logprobs == 4
    for field, fields in [
        ("n", {"n": 0}),
        ("n", {"n": 9}),
        ("best_of", {"n": 3, "best_of": 2}),
        ("best_of", {"best_of": 9}),
        ("length_penalty", {"length_penalty": 0.5}),
        ("early_stopping", {"early_stopping": 1}),
    ]:
        with pytest.raises(InvalidRequest) as raised:
            complete(**fields)
        assert raised.value.field == field


def test_a_beam_search_takes_nothing_but_likelihood() -> None:
    full = complete(n=2, best_of=4, use_beam_search=True, length_penalty=0.5, early_stopping=2)
    assert (full.n, full.best_of, full.length_penalty, full.early_stopping) == (2, 4, 0.5, 2)
    # The checkpoint's own defaults would change what is likeliest.
    assert (full.temperature, full.top_k, full.repetition_penalty) == (1, 0, 1)
    for field, value in [
        ("temperature", 0.7),
        ("top_p", 0.5),
        ("top_k", 3),
        ("min_p", 0.1),
        ("typical_p", 0.5),
        ("repetition_penalty", 1.1),
        ("presence_penalty", 1),
        ("frequency_penalty", 1),
        ("min_tokens", 1),
        ("stop", ["x"]),
        ("logit_bias", {1: 1.0}),
        ("allowed_token_ids", [1]),
        ("bad_words", ["x"]),
        ("structured_output", pb.StructuredOutput(json_object=True)),
        ("prompt_logprobs", 0),
        ("length_penalty", NAN),
        ("length_penalty", 6),
        ("early_stopping", 7),
    ]:
        with pytest.raises(InvalidRequest) as raised:
            complete(n=2, use_beam_search=True, **{field: value})
        assert raised.value.field == field
    with pytest.raises(InvalidRequest) as raised:
        complete(use_beam_search=True)
    assert raised.value.field == "best_of"
    complete(n=2, use_beam_search=True, temperature=0, top_p=1, min_tokens=0)


def test_a_salt_has_at_most_256_bytes() -> None:
    check_cache_salt("é" * 128)
    with pytest.raises(InvalidRequest) as raised:
        check_cache_salt("é" * 128 + "a")
    assert raised.value.field == "cache_salt"
