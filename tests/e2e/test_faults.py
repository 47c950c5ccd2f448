"""A worker that dies costs time, never tokens."""

import json
import os
import re
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.harness import Up, eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

PROMPT = list(range(3, 403))
GREEDY = {"temperature": 0, "ignore_eos": True}
SEEDED = {"temperature": 0.9, "seed": 3, "repetition_penalty": 1.1, "ignore_eos": True}


ON_ONE_GPU = ("--prefill-devices=0,0", "--decode-devices=0,0")
SERVERS = [
    pytest.param(("shm", ()), id="shm"),
    pytest.param(("gloo", ("--transport=gloo",)), id="gloo", marks=pytest.mark.long),
    *(
        pytest.param((name, (f"--transport={name}", *ON_ONE_GPU)), id=name, marks=pytest.mark.gpu)
        for name in ("nccl", "cuda_ipc")
    ),
]
"""By transport, the flags that make its links: what workers of one host choose by themselves, and others."""


@pytest.fixture(scope="module", params=SERVERS)
def split(request: pytest.FixtureRequest) -> Iterator[Up]:
    """Two prefill and two decode workers whose links are over one transport."""
    _, flags = request.param
    if not flags:
        yield request.getfixturevalue("split")
        return
    up = Up("--prefill=2", "--decode=2", *flags)
    yield up
    up.stop()


def stream(up: Up, after: dict[int, Any], **options: Any) -> list[int]:
    """Token ids of a streamed completion; `after[n]()` is called once n tokens have come."""
    body = {"model": up.model, "prompt": PROMPT, "stream": True, "return_token_ids": True} | options
    tokens: list[int] = []
    with up.client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, response.read()
        lines = [*()]
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                lines.append(line)
                continue
            chunk = json.loads(line.removeprefix("data: "))
            assert "error" not in chunk, chunk
            tokens += [token for choice in chunk["choices"] for token in choice["token_ids"]]
            for count in [count for count in after if count <= len(tokens)]:
                after.pop(count)()
    assert lines[-2:] == ["data: [DONE]", ""] or lines[-1] == "data: [DONE]"
    return tokens


def kill(up: Up, role: str, number: int) -> None:
    """kill -9 one worker, and see that it is gone."""
    pid = next(
        w["pid"] for w in up.state()["workers"] if w["id"] == f"{role}-{number}" and w["state"] == "ready"
    )
    os.kill(pid, signal.SIGKILL)


def busy(up: Up, role: str) -> int:
    """Number of the worker of this role that runs a request."""
    found: list[str] = []

    def look() -> bool:
        found[:] = [w["id"] for w in up.workers(role) if w["attempts"]]
        return bool(found)

    eventually(look, 10, f"a busy {role} worker")
    return int(found[0].rsplit("-", 1)[1])


def all_ready(up: Up) -> bool:
    return sum(worker["state"] == "ready" for worker in up.state()["workers"]) == 4


def test_links_are_over_the_transport_that_this_server_is_about(
    split: Up, request: pytest.FixtureRequest
) -> None:
    eventually(lambda: all_ready(split), 60, "all workers")
    split.complete(PROMPT, max_tokens=2, **GREEDY)
    used = {name for worker in split.workers() for name in worker["transports"].values()}
    assert used == {request.node.callspec.params["split"][0]}


@pytest.mark.parametrize("options", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_decode_worker_killed_in_mid_stream(split: Up, options: dict[str, Any]) -> None:
    eventually(lambda: all_ready(split), 60, "all workers")
    undisturbed = stream(split, {}, max_tokens=120, **options)
    disturbed = stream(
        split, {20: lambda: kill(split, "decode", busy(split, "decode"))}, max_tokens=120, **options
    )
    assert disturbed == undisturbed
    eventually(lambda: all_ready(split), 60, "all workers again")
    eventually(split.is_quiet, 5, "quiet")


def test_without_a_spare_a_stream_waits_for_the_restart() -> None:
    up = Up()
    try:
        undisturbed = stream(up, {}, max_tokens=60, **SEEDED)
        assert stream(up, {20: lambda: kill(up, "decode", 0)}, max_tokens=60, **SEEDED) == undisturbed
        eventually(up.is_quiet, 5, "quiet")
    finally:
        up.stop()


def test_prefill_worker_killed_before_the_first_token(split: Up) -> None:
    eventually(lambda: all_ready(split), 60, "all workers")
    long = {"prompt": list(range(3, 1803)), "max_tokens": 8, **GREEDY}
    undisturbed = split.complete(**long)["choices"][0]["token_ids"]
    long["cache_salt"] = "computed again"
    result: list[list[int]] = []
    caller = threading.Thread(target=lambda: result.append(split.complete(**long)["choices"][0]["token_ids"]))
    caller.start()
    kill(split, "prefill", busy(split, "prefill"))
    caller.join(60)
    assert result == [undisturbed]
    eventually(lambda: all_ready(split), 60, "all workers again")
    eventually(split.is_quiet, 5, "quiet")


def test_a_frozen_decode_worker_is_left_behind(split: Up) -> None:
    eventually(lambda: all_ready(split), 60, "all workers")
    undisturbed = stream(split, {}, max_tokens=60, **GREEDY)
    frozen: list[int] = []

    def freeze() -> None:
        number = busy(split, "decode")
        frozen.append(next(w["pid"] for w in split.state()["workers"] if w["id"] == f"decode-{number}"))
        os.kill(frozen[0], signal.SIGSTOP)

    try:
        assert stream(split, {10: freeze}, max_tokens=60, **GREEDY) == undisturbed
    finally:
        os.kill(frozen[0], signal.SIGCONT)
    eventually(lambda: all_ready(split), 60, "all workers again")
    eventually(split.is_quiet, 5, "quiet")


def test_decode_worker_killed_in_the_middle_of_a_structure(split: Up) -> None:
    """The next worker replays the tokens in the grammar: the text goes on as if nothing had happened."""
    eventually(lambda: all_ready(split), 60, "all workers")
    pattern = "([a-z]{4}=[0-9]{3};){9}!"
    options = SEEDED | {"max_tokens": 120, "ignore_eos": False, "guided_regex": pattern}
    undisturbed = stream(split, {}, **options)
    disturbed = stream(split, {9: lambda: kill(split, "decode", busy(split, "decode"))}, **options)
    assert disturbed == undisturbed
    text = split.client.post("/detokenize", json={"tokens": disturbed}).json()["prompt"]
    assert re.fullmatch(pattern, text)
    eventually(lambda: all_ready(split), 60, "all workers again")
    eventually(split.is_quiet, 5, "quiet")
