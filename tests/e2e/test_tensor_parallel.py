"""Workers of several ranks: the tokens of one rank, and what the death of a rank costs."""

import itertools
import os
import signal
from collections.abc import Iterator

import psutil
import pytest

from tests.e2e.harness import Up, eventually
from tests.e2e.test_faults import GREEDY, SEEDED, stream

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

salts = (f"lanes {number}" for number in itertools.count())


@pytest.fixture(scope="module", params=["auto", pytest.param("gloo", marks=pytest.mark.long)])
def parallel(request: pytest.FixtureRequest) -> Iterator[Up]:
    """A prefill worker and two decode workers of two ranks each."""
    up = Up("--prefill-tp=2", "--decode=2", "--decode-tp=2", f"--transport={request.param}")
    yield up
    up.stop()


def followers(up: Up, role: str) -> dict[str, list[psutil.Process]]:
    """Processes of the other ranks, by worker id."""
    return {
        worker["id"]: [
            child
            for child in psutil.Process(worker["pid"]).children()
            if "worker.lanes.follower" in child.cmdline()
        ]
        for worker in up.workers(role)
    }


def all_ready(up: Up) -> bool:
    return sum(worker["state"] == "ready" for worker in up.state()["workers"]) == 3


def same_tokens(one: Up, other: Up) -> bool:
    found = [
        [stream(up, {}, max_tokens=60, **options) for options in (GREEDY, SEEDED)] for up in (one, other)
    ]
    eventually(other.is_quiet, 5, "quiet")
    return found[0] == found[1]


@pytest.mark.parametrize(
    ("prefill", "decode", "transport"),
    [(2, 1, "auto"), *(pytest.param(1, 2, name, marks=pytest.mark.long) for name in ("auto", "gloo"))],
)
def test_ranks_on_one_side_only(colocated: Up, prefill: int, decode: int, transport: str) -> None:
    up = Up(f"--prefill-tp={prefill}", f"--decode-tp={decode}", f"--transport={transport}")
    try:
        assert same_tokens(colocated, up)
        up.stop()
    finally:
        up.kill()


def test_ranks_on_both_sides(colocated: Up, parallel: Up) -> None:
    assert same_tokens(colocated, parallel)


def test_a_killed_rank_ends_its_worker_and_the_stream_goes_on(parallel: Up) -> None:
    eventually(lambda: all_ready(parallel), 60, "all workers")
    undisturbed = stream(parallel, {}, max_tokens=120, **SEEDED)
    killed: list[psutil.Process] = []

    def kill() -> None:
        [busy] = [worker["id"] for worker in parallel.workers("decode") if worker["attempts"]]
        killed.extend(followers(parallel, "decode")[busy])
        os.kill(killed[0].pid, signal.SIGKILL)

    assert stream(parallel, {20: kill}, max_tokens=120, **SEEDED) == undisturbed
    assert f"tensor-parallel rank 1 (pid {killed[0].pid}) was killed by signal 9" in parallel.stderr
    eventually(lambda: all_ready(parallel), 60, "all workers again")
    eventually(parallel.is_quiet, 5, "quiet")


def test_no_rank_outlives_its_worker(parallel: Up) -> None:
    eventually(lambda: all_ready(parallel), 60, "all workers")
    [worker] = parallel.workers("prefill")
    [orphan] = followers(parallel, "prefill")["prefill-0"]
    os.kill(worker["pid"], signal.SIGKILL)
    eventually(lambda: not orphan.is_running() or orphan.status() == "zombie", 2, "the rank's end")
    eventually(lambda: all_ready(parallel), 60, "all workers again")


@pytest.mark.long
def test_a_frozen_rank_is_found_by_the_deadline(parallel: Up) -> None:
    eventually(lambda: all_ready(parallel), 60, "all workers")
    undisturbed = stream(parallel, {}, max_tokens=60, **GREEDY)
    frozen: list[psutil.Process] = []

    def freeze() -> None:
        [busy] = [worker["id"] for worker in parallel.workers("decode") if worker["attempts"]]
        frozen.extend(followers(parallel, "decode")[busy])
        frozen[0].suspend()

    assert stream(parallel, {10: freeze}, max_tokens=60, **GREEDY) == undisturbed
    eventually(lambda: not frozen[0].is_running() or frozen[0].status() == "zombie", 5, "the rank's end")
    eventually(lambda: all_ready(parallel), 60, "all workers again")


@pytest.mark.parametrize("role", [pytest.param("prefill", marks=pytest.mark.long), "decode"])
@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.long)], ids=lambda n: n.name
)
def test_a_rank_that_is_lost_in_the_midst_of_a_transfer(parallel: Up, role: str, number: int) -> None:
    """Its worker ends, the link's epoch too; the request is served again, to the same tokens."""
    eventually(lambda: all_ready(parallel), 60, "all workers")
    undisturbed = stream(parallel, {}, max_tokens=30, **SEEDED)
    parallel.points.arm("decode.frame", "slow 1.5")
    lost: list[psutil.Process] = []

    def lose() -> None:
        """At the first token: the decode worker's pump stands before the first frame."""
        parallel.points.wait_hit("decode.frame")
        [busy] = [worker["id"] for worker in parallel.workers(role) if worker["attempts"]]
        lost.extend(followers(parallel, role)[busy])
        lost[0].send_signal(number)
        parallel.points.release("decode.frame")

    found = stream(parallel, {1: lose}, max_tokens=30, cache_salt=next(salts), **SEEDED)
    assert found == undisturbed
    # Over shared memory a rank may be done with the frame when it freezes: then the next request finds it.
    assert stream(parallel, {}, max_tokens=30, cache_salt=next(salts), **SEEDED) == undisturbed
    eventually(lambda: not lost[0].is_running() or lost[0].status() == "zombie", 15, "the rank's end")
    eventually(lambda: all_ready(parallel), 60, "all workers again")
    eventually(parallel.is_quiet, 5, f"quiet ({parallel.held()})")
