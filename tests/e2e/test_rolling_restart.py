"""Every worker is told to stop, one after the other, under load: no client sees an error."""

import os
import signal
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.e2e.harness import eventually
from tests.faults.fleet import Fleet
from tests.faults.kill_score import NUM_PROMPTS, ask

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(240)]

DRAIN_S = 30.0


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet() as made:
        yield made


class Load:
    """Streams of requests from four clients; every answer must be the undisturbed one."""

    def __init__(self, fleet: Fleet, want: list[list[int]]) -> None:
        self.num_exact, self.wrong = 0, [*()]
        self._fleet, self._want = fleet, want
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(4)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(60)

    def _run(self, number: int) -> None:
        count = 0
        with httpx.Client(timeout=60) as client:
            while not self._stopping.is_set():
                which = (number + count) % NUM_PROMPTS
                count += 1
                try:
                    got = ask(client, self._fleet.urls["gateway-0"], which, f"{number}/{count}")
                except (AssertionError, httpx.HTTPError) as error:
                    self.wrong.append(repr(error))
                    continue
                self.num_exact += got == self._want[which]
                self.wrong += [] if got == self._want[which] else [f"other tokens of {which}"]


def test_all_workers_one_after_the_other(fleet: Fleet) -> None:
    with httpx.Client(timeout=60) as client:
        want = [ask(client, fleet.urls["gateway-0"], which) for which in range(NUM_PROMPTS)]
    with Load(fleet, want) as load:
        for name in ("prefill-0", "decode-0", "prefill-1", "decode-1"):
            fleet.busy(name.split("-")[0])
            process = fleet.members[name].process
            start_s = time.monotonic()
            process.send_signal(signal.SIGTERM)
            eventually(lambda name=name: fleet.worker_states()[name] != "ready", 2, f"{name} not ready")
            not_ready_s = time.monotonic() - start_s
            assert process.wait(DRAIN_S) == 0
            fleet.restart(name)
            print(f"{name}: not ready after {not_ready_s:.3f} s")
            assert not_ready_s < 1.0, "0.1 s is promised; this machine serves at the same time"
    assert load.wrong == []
    assert load.num_exact > 20
    eventually(lambda: not fleet.held(), 5, "quiet")


def test_a_stream_that_does_not_end_in_time_moves(fleet: Fleet) -> None:
    """SIGTERM twice is no patience at all: the process goes at once, its streams go on elsewhere."""
    url = f"{fleet.urls['gateway-0']}/v1/completions"
    body = {"prompt": list(range(3, 203)), "max_tokens": 400, "temperature": 0, "ignore_eos": True}
    body |= {"return_token_ids": True}
    want = fleet.client.post(url, json=body).json()["choices"][0]["token_ids"]
    result: list[list[int]] = []

    def run() -> None:
        with httpx.Client(timeout=60) as client:
            answer = client.post(url, json=body | {"cache_salt": "moves"})
        result.append(answer.json()["choices"][0]["token_ids"])

    asked = threading.Thread(target=run)
    asked.start()
    name = fleet.busy("decode")
    process = fleet.members[name].process
    os.kill(process.pid, signal.SIGTERM)
    eventually(lambda: fleet.worker_states()[name] != "ready", 2, f"{name} draining")
    os.kill(process.pid, signal.SIGTERM)
    process.wait(5)
    asked.join(60)
    assert result == [want]
    fleet.restart(name)
