"""Attempts wait for their grammar beside everybody else."""

import asyncio
import threading

import pytest

from protos.tandem.v1 import common_pb2 as pb
from runtime.errors import InvalidRequest
from runtime.grammars import Grammar
from worker.attach import AttemptKey
from worker.convert import to_grammar
from worker.grammar_intake import GrammarIntake

KEYS = [AttemptKey(0, request, 0) for request in range(4)]


class GatedCompiler:
    """Compiles when it is let; refuses the regular expression "bad"."""

    def __init__(self):
        self.gate = threading.Event()
        self.known = set()

    def __contains__(self, grammar):
        return grammar in self.known

    def compile(self, grammar):
        assert self.gate.wait(5)
        if grammar.text == "bad":
            raise InvalidRequest("bad", field="structured_output")
        self.known.add(grammar)


class Recorder:
    """The role: what reached it."""

    def __init__(self):
        self.submitted, self.aborted, self.failed = [], [], {}

    def submit(self, key, submit):
        self.submitted.append(key)

    def abort(self, key):
        self.aborted.append(key)

    def fail(self, key, error):
        self.failed[key] = error


def submit_of(regex=None):
    sampling = pb.SamplingParams()
    if regex is not None:
        sampling.structured_output.regex = regex
    return pb.Submit(sampling=sampling)


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0)


async def test_only_attempts_with_a_new_grammar_wait():
    compiler, role = GatedCompiler(), Recorder()
    intake = GrammarIntake(role, compiler, role.fail)
    intake.submit(KEYS[0], submit_of("a"))
    intake.submit(KEYS[1], submit_of())
    intake.submit(KEYS[2], submit_of("bad"))
    assert role.submitted == [KEYS[1]]
    compiler.gate.set()
    await until(lambda: role.failed)
    assert role.submitted == [KEYS[1], KEYS[0]]
    assert role.failed[KEYS[2]].field == "structured_output"
    intake.submit(KEYS[3], submit_of("a"))
    assert role.submitted[-1] == KEYS[3]
    intake.abort(KEYS[0])
    assert role.aborted == [KEYS[0]]


async def test_an_aborted_attempt_never_reaches_the_role():
    compiler, role = GatedCompiler(), Recorder()
    intake = GrammarIntake(role, compiler, role.fail)
    intake.submit(KEYS[0], submit_of("a"))
    intake.submit(KEYS[1], submit_of("b"))
    intake.abort(KEYS[0])
    compiler.gate.set()
    await until(lambda: role.submitted)
    assert role.submitted == [KEYS[1]]
    assert not role.aborted
    assert not role.failed


@pytest.mark.parametrize(
    ("output", "want"),
    [
        ({"json_schema": "{}"}, Grammar("json_schema", "{}")),
        ({"json_object": True}, Grammar("json_object", "")),
        ({"regex": "a"}, Grammar("regex", "a")),
        ({"grammar": "start: A"}, Grammar("grammar", "start: A")),
        ({"choice": {"texts": ["a", "ü"]}}, Grammar("choice", '["a", "\\u00fc"]')),
        ({}, None),
    ],
)
def test_grammars_on_the_wire(output, want):
    assert to_grammar(pb.SamplingParams(structured_output=pb.StructuredOutput(**output))) == want
