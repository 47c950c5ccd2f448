"""Clients that leave, and deadlines that pass, while a request is validated, tokenised or rendered."""

import asyncio
import itertools
import threading
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from gateway.chat_renderer import ChatRenderer
from gateway.chat_template import TemplateSource
from gateway.model import ServedModel
from tests.fakes.cluster import Cluster, cluster, http
from tests.faults.calls import DEADLINE, FACES, Call

PROMPT = [300, 301, 302, 303]
MODEL = {"model": "demo"}
salts = (f"early {number}" for number in itertools.count())
QUICK = ("http-unary", "grpc-stream")
BY_FACE = [pytest.param(face, marks=() if face in QUICK else pytest.mark.long) for face in FACES]


async def begin(made: Cluster, face: str, timeout_s: float | None = None) -> Call:
    up = SimpleNamespace(http=made.url, grpc=made.grpc, model="demo")
    return await asyncio.to_thread(FACES[face], up, PROMPT, 20, next(salts), timeout_s)


def expect_nothing(made: Cluster) -> None:
    """No worker has heard of anything, and nothing is held."""
    assert not any(worker.submits for worker in made.workers.values())
    assert made.gateway.flow.ledger.held == made.gateway.fleet.attempts.held == 0


@pytest.mark.parametrize("face", BY_FACE)
async def test_a_request_in_validation_goes_with_its_client_or_its_deadline(
    face: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster(("decode", "d1")) as made:
        flow, reached = made.gateway.flow, asyncio.Event()

        async def never(*_: Any) -> None:
            reached.set()
            await asyncio.Event().wait()

        monkeypatch.setattr(flow, "_prepare", never)
        first = await begin(made, face)
        await reached.wait()
        assert flow.num_live == 1
        await asyncio.to_thread(first.leave)
        await made.quiet()
        second = await begin(made, face, 0.2)
        assert await asyncio.to_thread(second.outcome) == DEADLINE
        await made.quiet()
        expect_nothing(made)


async def test_a_deadline_passes_while_a_long_text_is_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread works on; what it finds is dropped, and others are served meanwhile."""
    async with cluster(("decode", "d1")) as made, http(made) as client:
        done, entered = threading.Event(), threading.Event()
        encode = made.model.tokenizer.encode_text

        def slow(text: str, **options: bool) -> Any:
            entered.set()
            done.wait(10)
            return encode(text, **options)

        monkeypatch.setattr(made.model.tokenizer, "encode_text", slow)
        monkeypatch.setattr("gateway.prompts.LARGE_TEXT_CHARS", 0)
        body = MODEL | {"prompt": "a text", "max_tokens": 2}
        try:
            late = await client.post("/v1/completions", json=body, headers={"x-request-timeout": "0.2"})
            assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
            assert entered.is_set()
            await made.quiet()
            expect_nothing(made)
            other = await client.post("/v1/completions", json=MODEL | {"prompt": PROMPT, "max_tokens": 2})
            assert other.status_code == 200
        finally:
            done.set()


async def test_a_deadline_passes_while_a_template_is_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next chat waits for a new helper and is served."""
    chat = ChatRenderer(TemplateSource(source=SLOW_TEMPLATE, special_tokens={}, origin="the test"))
    monkeypatch.setattr(ServedModel, "renderer", lambda _: chat)
    async with cluster(("decode", "d1")) as made, http(made) as client:

        async def ask(content: str, **headers: str) -> httpx.Response:
            talk = MODEL | {"messages": [{"role": "user", "content": content}], "max_tokens": 2}
            return await client.post("/v1/chat/completions", json=talk, headers=headers)

        try:
            await chat.start()
            late = await ask("slow", **{"x-request-timeout": "0.2"})
            assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
            await made.quiet()
            expect_nothing(made)
            assert (await ask("quick")).status_code == 200
        finally:
            await chat.close()


SLOW_TEMPLATE = (
    "{% if messages[0].content == 'slow' %}"
    "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"
    "{% endif %}{{ messages[0].content }}"
)
