"""Grammars are judged in a process that may die of them."""

import asyncio
import json

import pytest

from gateway.grammar_check import TOO_EXPENSIVE, GrammarCheck
from runtime.checkpoint_dir import bundled_model
from runtime.errors import InvalidRequest
from runtime.grammars import Grammar

GOOD = [
    Grammar("json_object", ""),
    Grammar("json_schema", '{"type": "integer"}'),
    Grammar("regex", "(a|aa)*b"),
    Grammar("grammar", 'root ::= "a" root | "b"'),
    Grammar("choice", '["a", "ü\\n\\""]'),
]
BAD = [
    Grammar("json_schema", "{"),
    Grammar("json_schema", '{"type":"array","items":' * 5000 + "{}" + "}" * 5000),
    Grammar("json_schema", '{"$ref": "https://example.com/schema.json"}'),
    Grammar("regex", "(" * 30_000 + "a" + ")" * 30_000),
    Grammar("regex", "(?<=a)b"),
    Grammar("grammar", "start: nowhere"),
]
SLOW = Grammar("json_schema", '{"type": "integer", "multipleOf": 99999989}')
LARGE = Grammar("grammar", "start: A\nA: " + " & ".join(f"/(.|\\n)*w{i}q(.|\\n)*/" for i in range(400)))


@pytest.fixture
async def check():
    check = GrammarCheck(bundled_model() / "tokenizer.json", 4096)
    yield check
    await check.close()


async def refusal(check, grammar):
    try:
        await check.check(grammar)
    except InvalidRequest as error:
        return error.message
    return None


async def test_good_and_bad_grammars(check):
    assert [await refusal(check, grammar) for grammar in GOOD] == [None] * len(GOOD)
    refusals = [await refusal(check, grammar) for grammar in BAD]
    assert all(refusals)
    assert TOO_EXPENSIVE not in refusals


@pytest.mark.parametrize("grammar", [SLOW, LARGE], ids=["slow", "large"])
async def test_what_kills_the_helper_is_too_expensive_and_disturbs_nobody(check, grammar):
    verdicts = await asyncio.gather(*(refusal(check, each) for each in (GOOD[2], grammar, GOOD[1])))
    assert verdicts == [None, TOO_EXPENSIVE, None]
    # Remembered: nobody pays twice for the same one.
    started = asyncio.get_running_loop().time()
    assert await refusal(check, grammar) == TOO_EXPENSIVE
    assert asyncio.get_running_loop().time() - started < 0.1


async def test_a_client_that_leaves_does_not_mix_up_the_answers(check):
    leaving = asyncio.create_task(refusal(check, SLOW))
    await asyncio.sleep(0)
    others = [asyncio.create_task(refusal(check, grammar)) for grammar in (*BAD[:1], *GOOD[:1])]
    await asyncio.sleep(0)
    leaving.cancel()
    refused, fine = await asyncio.gather(*others)
    assert refused is not None
    assert fine is None


async def test_a_tokenizer_that_llguidance_cannot_use_refuses_every_grammar(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": "none"}))
    check = GrammarCheck(tmp_path / "tokenizer.json", 4096)
    for _ in range(2):
        message = await refusal(check, GOOD[0])
        assert message is not None
        assert "not available for this model" in message
    await check.close()
