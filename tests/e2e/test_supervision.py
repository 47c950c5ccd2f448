"""kill -9 of any process heals, and leaves nobody behind; so does a hang that never ends."""

import itertools
import os
import signal
from collections import Counter
from collections.abc import Iterator

import httpx
import psutil
import pytest

from tests.e2e.harness import Up, eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

ROLES = ("gateway.grammar_helper", "gateway.template_helper", "gateway", "prefill_svc", "decode_svc")
patterns = (f"[a-f]{{{number}}}" for number in itertools.count(3))
"""Each a new one: verdicts on grammars are kept, and then the helper is not needed."""


@pytest.fixture(scope="module")
def up() -> Iterator[Up]:
    up = Up("--decode=2")
    yield up
    up.stop()


def children(up: Up) -> dict[int, str]:
    """Roles of all processes below the launcher."""
    found = {}
    for process in psutil.Process(up.process.pid).children(recursive=True):
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        found[process.pid] = next((role for role in ROLES if role in words), " ".join(words))
    return found


def kill(up: Up, role: str) -> int:
    pid = next(pid for pid, name in children(up).items() if name == role)
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not psutil.pid_exists(pid), 5, f"the end of {role}")
    return pid


def whole(up: Up) -> bool:
    try:
        state = up.state()
    except httpx.HTTPError:
        return False
    ready = sum(worker["state"] == "ready" for worker in state["workers"])
    return ready == 3 and up.client.get("/ready").status_code == 200


def expect_whole(up: Up) -> None:
    """Everything is back, exactly once, and serves."""
    eventually(lambda: whole(up), 60, "all processes again")
    up.complete([3, 4, 5], temperature=0, max_tokens=8, guided_regex=next(patterns))
    assert up.client.post("/tokenize", json={"messages": [{"role": "user", "content": "x"}]}).is_success
    assert Counter(children(up).values()) == dict.fromkeys(ROLES, 1) | {"decode_svc": 2}
    eventually(up.is_quiet, 5, "quiet")


def test_the_gateway_comes_back_on_its_ports_and_workers_give_its_requests_up(up: Up) -> None:
    expect_whole(up)
    body = {"prompt": [3, 4, 5], "max_tokens": 2000, "ignore_eos": True, "stream": True}
    with up.client.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        assert next(lines)
        kill(up, "gateway")
        with pytest.raises(httpx.HTTPError):
            list(lines)
    expect_whole(up)
    assert "gateway was killed by signal 9; starting again in 0.5 s" in up.stderr


@pytest.mark.parametrize("role", [role for role in ROLES if role != "gateway"])
def test_everything_else_comes_back_too(up: Up, role: str) -> None:
    expect_whole(up)
    before = children(up)
    pid = kill(up, role)
    expect_whole(up)
    after = children(up)
    assert pid not in after
    assert len(before.keys() & after.keys()) == len(before) - 1  # and nobody else was touched


@pytest.mark.long
def test_a_worker_whose_step_hangs_for_good_is_started_again() -> None:
    """It is the only one: the stream waits for its next life and goes on."""
    up = Up("--prefill=0", "--restart-stuck-after-s=2")
    try:
        prompt = [3, 4, 5]
        want = up.complete(prompt, temperature=0, max_tokens=200, ignore_eos=True)["choices"][0]["token_ids"]
        up.points.arm("decode.step", "hang")
        answer = up.complete(prompt, temperature=0, max_tokens=200, ignore_eos=True)
        (pid,) = up.points.hits("decode.step")
        assert answer["choices"][0]["token_ids"] == want
        assert not psutil.pid_exists(pid)
        assert "decode-0 lives and does not serve" in up.stderr
        eventually(up.is_quiet, 5, "quiet")
    finally:
        up.stop()
