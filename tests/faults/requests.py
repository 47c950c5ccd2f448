"""Requests for a soak: a seeded catalogue, each with the tokens that it gives when nothing disturbs it."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.e2e.harness import Up

LAST_TOKEN_ID = 4095
SEEDED = {"temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.1}


class WrongAnswer(AssertionError):
    """A response that broke a promise: an error, other tokens, not exactly one end."""


@dataclass
class Request:
    """One entry of the catalogue."""

    number: int
    body: dict[str, Any]
    want: list[list[int]] = field(default_factory=list)
    """Output token ids of each choice, from an undisturbed run."""

    @property
    def num_choices(self) -> int:
        """How many sequences it asks for."""
        return int(self.body.get("n", 1))


def catalogue(up: Up, rng: random.Random, size: int) -> list[Request]:
    """`size` random requests with their undisturbed tokens; nothing else may be running."""
    requests = [Request(number, _body(up.model, rng)) for number in range(size)]
    for request in requests:
        answer = up.client.post("/v1/completions", json=request.body)
        assert answer.status_code == 200, answer.text
        request.want = [choice["token_ids"] for choice in answer.json()["choices"]]
    return requests


def _body(model: str, rng: random.Random) -> dict[str, Any]:
    length = rng.choice((3, 15, 16, 17, 64, 200, 500, 900)) + rng.randrange(4)
    body: dict[str, Any] = {
        "model": model,
        "prompt": [rng.randrange(3, LAST_TOKEN_ID) for _ in range(length)],
        "max_tokens": rng.choice((1, 8, 40, 80, 120)),
        "ignore_eos": True,
        "return_token_ids": True,
    }
    if rng.random() < 0.4:
        return body | {"temperature": 0}
    return body | SEEDED | {"seed": rng.randrange(1 << 30), "n": rng.choice((1, 1, 2, 3))}


def perform(client: httpx.Client, request: Request, rng: random.Random) -> str:
    """Run it in a random way and compare; how it ended. Raises WrongAnswer."""
    body = dict(request.body)
    if rng.random() < 0.5:
        # Nothing of it is in a prefix cache.
        body["cache_salt"] = str(rng.random())
    way = rng.choice(("whole", "stream", "stream", "cancel"))
    if way == "whole":
        _whole(client, request, body)
    else:
        leave_after = rng.randrange(1, 40) if way == "cancel" else None
        _stream(client, request, body, leave_after)
    return way


def _whole(client: httpx.Client, request: Request, body: dict[str, Any]) -> None:
    answer = client.post("/v1/completions", json=body)
    if answer.status_code != 200:
        raise WrongAnswer(f"{answer.status_code} {answer.text}")
    _compare(request, [choice["token_ids"] for choice in answer.json()["choices"]])


def _stream(client: httpx.Client, request: Request, body: dict[str, Any], leave_after: int | None) -> None:
    """Read the stream to its end, or go away after so many tokens."""
    tokens: list[list[int]] = [[] for _ in range(request.num_choices)]
    ends: list[int] = []
    with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        if response.status_code != 200:
            raise WrongAnswer(f"{response.status_code} {response.read().decode()}")
        for choice in _choices(response):
            tokens[choice["index"]] += choice["token_ids"]
            ends += [choice["index"]] if choice["finish_reason"] else []
            if leave_after is not None and sum(map(len, tokens)) >= leave_after:
                return _compare(request, tokens, whole=False)
    if sorted(ends) != list(range(request.num_choices)):
        raise WrongAnswer(f"ends of choices {ends}")
    _compare(request, tokens)


def _choices(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The choices of all events; the stream must end with exactly one [DONE] and hold no error."""
    events = [*()]
    for line in response.iter_lines():
        if not line:
            continue
        events.append(line)
        if line.startswith("data: {"):
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise WrongAnswer(line)
            yield from chunk["choices"]
    if events.count("data: [DONE]") != 1 or events[-1] != "data: [DONE]":
        raise WrongAnswer(f"a stream that ends with {events[-1:]}")


def _compare(request: Request, got: list[list[int]], whole: bool = True) -> None:
    for want, tokens in zip(request.want, got, strict=True):
        if tokens != (want if whole else want[: len(tokens)]):
            at = next((i for i, pair in enumerate(zip(want, tokens, strict=False)) if pair[0] != pair[1]), -1)
            raise WrongAnswer(f"{len(tokens)} tokens for {len(want)}, first other one at {at}")
