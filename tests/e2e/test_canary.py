"""What clients say and get stands in no log, span, metric or error, at the most talkative level."""

import json
import secrets
from collections.abc import Iterator
from typing import Any, NamedTuple

import grpc
import httpx
import pytest

from protos.tandem.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from tests.e2e.harness import Up, eventually
from tests.e2e.test_faults import all_ready, busy, kill
from tests.fakes.otlp import Collector, collector

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

CANARY = f"Canary{secrets.token_hex(6)}"
"""In every prompt, in answers and keys: nobody quotes it but an answer."""

PARAMETER = f"Parameter{secrets.token_hex(6)}"
"""In parameters, which an error may quote to the client that sent them."""

KEY, ADMIN_KEY = f"{CANARY}-api", f"{CANARY}-admin"
TEXT = f"def {CANARY}(x):  # {CANARY}"
CHAT = [{"role": "system", "content": TEXT}, {"role": "user", "content": TEXT}]
OPTIONS = {"stop": [PARAMETER], "bad_words": [PARAMETER], "cache_salt": PARAMETER, "user": PARAMETER}

SLOW = {"type": "integer", "multipleOf": 99999989, "title": PARAMETER}
"""A grammar that its helper does not survive."""

BAD: list[tuple[str, dict[str, Any] | str]] = [
    ("completions", {"prompt": TEXT, "temperature": -1}),
    ("completions", {"prompt": TEXT, "max_tokens": 10**6}),
    ("completions", {"prompt": TEXT * 20_000}),
    ("completions", {"prompt": TEXT * 200_000}),
    ("completions", {"prompt": [TEXT, TEXT]}),
    ("completions", {"prompt": {"text": TEXT}}),
    ("completions", {"prompt": TEXT, "stop": [PARAMETER] * 17}),
    ("completions", {"prompt": TEXT, "stop": [PARAMETER * 40]}),
    ("completions", {"prompt": TEXT, "guided_regex": f"({PARAMETER}"}),
    ("completions", {"prompt": TEXT, "guided_json": {"type": PARAMETER}}),
    ("completions", {"prompt": TEXT, "guided_grammar": f"start: {PARAMETER}"}),
    ("completions", {"prompt": TEXT, "guided_json": SLOW}),
    ("completions", {"prompt": TEXT, "cache_salt": PARAMETER * 40}),
    ("completions", {"prompt": TEXT, "model": f"no-{secrets.token_hex(4)}"}),
    ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image", "image": TEXT}]}]}),
    ("chat/completions", {"messages": [{"role": "user", "content": TEXT, "tool_calls": [TEXT]}]}),
    ("chat/completions", {"messages": CHAT, "response_format": {"type": PARAMETER}}),
    ("completions", f'{{"prompt": "{TEXT}", '),
    ("completions", f'"{TEXT}"'),
]  # fmt: skip
"""Wrong in every way that quotes what it is about."""


class Told(NamedTuple):
    """A running server that was told the canary, and what it exports."""

    up: Up
    collector: Collector


@pytest.fixture(scope="module")
def told() -> Iterator[Told]:
    with collector() as made, pytest.MonkeyPatch.context() as environment:
        environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", made.endpoint)
        environment.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        environment.setenv("TANDEM_API_KEYS", KEY)
        environment.setenv("TANDEM_ADMIN_KEY", ADMIN_KEY)
        up = Up("--prefill=2", "--decode=2", "--log-level=debug")
        up.client.headers["authorization"] = f"Bearer {KEY}"
        eventually(lambda: all_ready(up), 60, "all workers")
        yield Told(up, made)
        up.stop()


def errors(up: Up) -> Iterator[str]:
    """The answers to what is wrong."""
    for path, body in BAD:
        content = body if isinstance(body, str) else json.dumps(body)
        response = up.client.post(f"/v1/{path}", content=content)
        assert response.status_code in (400, 404, 413), (body, response.text)
        yield response.text
    stranger = httpx.Client(base_url=up.http, headers={"authorization": f"Bearer {CANARY}"})
    with stranger:
        yield stranger.post("/v1/completions", json={"prompt": TEXT}).text
    with grpc.insecure_channel(up.grpc) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        for sampling in ({"temperature": -1}, {"stop": [PARAMETER] * 17}):
            asked = inference_pb2.CompleteRequest(text=TEXT, sampling=common_pb2.SamplingParams(**sampling))
            with pytest.raises(grpc.RpcError) as raised:
                stub.Complete(asked, metadata=(("authorization", f"Bearer {KEY}"),))
            yield str(raised.value)


def good(up: Up) -> None:
    """Requests that succeed, and one whose worker dies; each answer holds the canary."""
    forced = {"guided_choice": [f"{CANARY} answers"], "max_tokens": 64}
    answers = [
        up.client.post("/v1/completions", json={"prompt": TEXT, **forced, "logprobs": 2, "n": 2}),
        up.client.post("/v1/chat/completions", json={"messages": CHAT, **forced}),
        up.client.post("/v1/chat/completions", json={"messages": CHAT, **forced, "stream": True}),
        up.client.post("/tokenize", json={"messages": CHAT}),
    ]
    assert all(answer.status_code == 200 for answer in answers), [answer.text for answer in answers]
    assert all(CANARY[:6] in answer.text for answer in answers[:2])
    body = {"prompt": TEXT, "max_tokens": 150, "ignore_eos": True, "stream": True, **OPTIONS}
    with up.client.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        assert next(lines)
        kill(up, "decode", busy(up, "decode"))
        assert [line for line in lines if line][-1] == "data: [DONE]"


def told_in(text: str) -> bool:
    return CANARY in text or PARAMETER in text


def test_nothing_repeats_what_clients_say(told: Told) -> None:
    up, collected = told
    good(up)
    for answer in errors(up):
        assert CANARY not in answer, answer
    eventually(lambda: all_ready(up), 60, "all workers again")
    eventually(up.is_quiet, 5, "quiet")
    urls = [up.http, *(worker["http"] for worker in up.workers())]
    for url in urls:
        for path in ("/metrics", "/debug/state"):
            text = up.client.get(f"{url}{path}").text
            assert not told_in(text), (url, path)
    eventually(lambda: any(span.is_error or span.event_attributes for span in collected.spans), 10, "spans")
    assert len(collected.spans) > 50
    for body in collected.bodies:
        assert not told_in(body.decode(errors="replace"))
    logged = up.stdout + up.stderr
    assert "was killed by signal 9" in logged
    assert not [line for line in logged.splitlines() if told_in(line)]
