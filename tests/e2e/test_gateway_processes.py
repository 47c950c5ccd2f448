"""`tandem up --gateway-processes 2`: one server to its clients."""

import os
import signal
import threading
from collections.abc import Iterator

import httpx
import psutil
import pytest

from tandem import Client
from tests.e2e.harness import Up, eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

BODY = {"prompt": [3, 4, 5], "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def up() -> Iterator[Up]:
    up = Up("--prefill=0", "--gateway-processes=2")
    yield up
    up.stop()


def gateways(up: Up) -> list[psutil.Process]:
    children = psutil.Process(up.process.pid).children(recursive=True)
    return [child for child in children if "gateway" in child.cmdline()]


def completed(up: Up) -> float:
    """Of all processes, as any one of them says."""
    page = httpx.get(f"{up.http}/metrics").text
    lines = [line for line in page.splitlines() if line.startswith('tandem_requests_total{outcome="ok"}')]
    return sum(float(line.split()[-1]) for line in lines)


def test_connections_are_shared_and_counted_together(up: Up) -> None:
    assert len(gateways(up)) == 2
    before = completed(up)
    texts = {httpx.post(f"{up.http}/v1/completions", json=BODY, timeout=30).text for _ in range(6)}
    assert len(texts) == 6
    assert all('"length"' in text for text in texts)
    assert completed(up) == before + 6
    state = up.state()
    assert state["gateway_processes"] == 2
    assert [worker["state"] for worker in state["workers"]] == ["ready"]
    # Twenty connections all at one of two would be chance once in 500,000 runs.
    pids = {connection.pid for connection in held_connections(up)}
    assert pids == {process.pid for process in gateways(up)}


def held_connections(up: Up) -> list[psutil.Process]:
    """The gateway processes at the other ends of twenty idle connections."""
    port = int(up.http.rsplit(":", 1)[1])
    clients = [httpx.Client(base_url=up.http) for _ in range(20)]
    try:
        for client in clients:
            assert client.get("/health").status_code == 200
        return [
            process
            for process in gateways(up)
            for connection in process.net_connections("tcp")
            if connection.status == psutil.CONN_ESTABLISHED and connection.laddr.port == port
        ]
    finally:
        for client in clients:
            client.close()


async def test_abort_finds_a_request_wherever_it_runs(up: Up) -> None:
    async with Client(up.grpc) as client:
        for number in range(4):
            name, ends = f"long-{number}", []
            body = BODY | {"max_tokens": 400, "ignore_eos": True, "stream": True}
            started = threading.Event()
            thread = threading.Thread(target=_read, args=(up, body, name, started, ends))
            thread.start()
            assert started.wait(20)
            assert await client.abort(name) == [name]
            thread.join(20)
            assert '"abort"' in ends[0]


def _read(up: Up, body: dict[str, object], name: str, started: threading.Event, ends: list[str]) -> None:
    headers = {"x-request-id": name}
    with httpx.stream("POST", f"{up.http}/v1/completions", json=body, headers=headers, timeout=30) as answer:
        text = ""
        for part in answer.iter_text():
            text += part
            started.set()
    ends.append(text)


@pytest.mark.long
def test_a_killed_process_comes_back_and_the_other_serves_on(up: Up) -> None:
    victim = gateways(up)[0]
    os.kill(victim.pid, signal.SIGKILL)
    eventually(lambda: not psutil.pid_exists(victim.pid), 5, "its end")
    for _ in range(4):
        assert httpx.post(f"{up.http}/v1/completions", json=BODY, timeout=30).status_code == 200
    eventually(lambda: up.state().get("gateway_processes") == 2, 30, "two processes again")
