"""Partitions between real processes: a worker cut off, and two workers that live and cannot talk."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.harness import eventually
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
