"""Partitions between real processes: a worker cut off, and two workers that live and cannot talk."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.harness import eventually
from tests.faults.faults import stall
from tests.faults.fleet import Fleet
from tests.faults.proxy import DOWN, UP

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(240)]

PROMPT = list(range(3, 403))


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet() as made:
        yield made


def complete(fleet: Fleet, **fields: Any) -> list[int]:
    body = {"prompt": PROMPT, "max_tokens": 60, "temperature": 0.9, "seed": 5, "ignore_eos": True}
    answer = fleet.client.post(
        f"{fleet.urls['gateway-0']}/v1/completions", json=body | {"return_token_ids": True} | fields
    )
    assert answer.status_code == 200, answer.text
    tokens: list[int] = answer.json()["choices"][0]["token_ids"]
    return tokens


def expect_whole(fleet: Fleet) -> None:
    eventually(fleet.is_whole, 20, "all workers again")
    eventually(lambda: not fleet.held(), 5, "quiet")


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_worker_that_nobody_reaches_is_left_behind_and_comes_back(fleet: Fleet, role: str) -> None:
    expect_whole(fleet)
    want = complete(fleet)
    for name in [name for name in fleet.members if name.startswith(role)]:
        proxies = fleet.members[name].proxies
        for proxy in proxies:
            proxy.set(blackhole=(UP, DOWN))
        assert complete(fleet, cache_salt=name) == want
        eventually(lambda name=name: fleet.worker_states()[name] == "down", 10, f"{name} down")
        assert all(proxy.hits["blackhole"] for proxy in proxies)
        for proxy in proxies:
            proxy.set()
        expect_whole(fleet)


def test_two_workers_that_cannot_talk_leave_each_other(fleet: Fleet) -> None:
    """The stream between them is cut; gateways reach both. Each request goes another way."""
    expect_whole(fleet)
    want = complete(fleet)
    cut = [fleet.members[f"decode-{number}"].attach for number in range(2)]
    pid = fleet.members["prefill-0"].pid
    for proxy in cut:
        assert proxy is not None
        proxy.set(blackhole=(UP, DOWN), only_pid=pid)
    for number in range(3):
        assert complete(fleet, cache_salt=f"cut {number}") == want
    assert fleet.is_whole()
    assert sum(proxy.hits["blackhole"] for proxy in cut if proxy is not None)
    for proxy in cut:
        assert proxy is not None
        proxy.set()
    expect_whole(fleet)
    assert complete(fleet, cache_salt="healed") == want


def test_without_prefill_workers_decode_workers_serve_and_without_those_nobody_does(fleet: Fleet) -> None:
    expect_whole(fleet)
    want = complete(fleet)
    url = fleet.urls["gateway-0"]
    body = {"prompt": PROMPT, "max_tokens": 8}

    def cut(role: str, **weather: Any) -> None:
        for name, member in fleet.members.items():
            for proxy in member.proxies if name.startswith(role) else ():
                proxy.set(**weather)

    cut("prefill", blackhole=(UP, DOWN))
    eventually(
        lambda: "ready" not in (fleet.worker_states()[f"prefill-{n}"] for n in (0, 1)), 5, "no prefill"
    )
    assert complete(fleet, cache_salt="alone") == want
    cut("decode", blackhole=(UP, DOWN))
    eventually(lambda: fleet.client.get(f"{url}/ready").status_code == 503, 5, "not ready")
    refused = fleet.client.post(f"{url}/v1/completions", json=body, timeout=2)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    cut("prefill")
    cut("decode")
    eventually(lambda: fleet.client.get(f"{url}/ready").status_code == 200, 10, "ready again")
    expect_whole(fleet)
    assert complete(fleet, cache_salt="back") == want


@pytest.mark.parametrize("stop_s", [1.5, 4.0])
def test_a_gateway_that_stood_still_blames_nobody(fleet: Fleet, stop_s: float) -> None:
    """Its streams go on; what the workers said meanwhile waits in the sockets."""
    expect_whole(fleet)
    want = complete(fleet, max_tokens=200)
    result: list[list[int]] = []
    asked = threading.Thread(target=lambda: result.append(complete(fleet, max_tokens=200, cache_salt="s")))
    asked.start()
    fleet.busy("decode")
    stall(fleet.members["gateway-0"].pid, stop_s)
    asked.join(60)
    assert result == [want]
    assert fleet.is_whole()
    expect_whole(fleet)
