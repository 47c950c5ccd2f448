"""Workers that live and do not move: a step that hangs, a stop, a freeze, a share of a CPU."""

import contextlib
import os
import signal
import threading
import time
from typing import Any

import psutil
import pytest

from tests.e2e.harness import Up, eventually
from tests.e2e.test_faults import SEEDED, all_ready, busy, stream
from tests.faults import cgroups
from tests.faults.faults import process_state

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

OPTIONS = SEEDED | {"max_tokens": 80}


def pid_of(up: Up, worker_id: str) -> int:
    return next(worker["pid"] for worker in up.state()["workers"] if worker["id"] == worker_id)


def expect_whole(up: Up) -> None:
    eventually(lambda: all_ready(up), 60, "all workers")
    eventually(up.is_quiet, 5, "quiet")


def retries(up: Up) -> float:
    return up.metric(up.http, "tandem_request_retries_total")


@pytest.mark.parametrize("point", ["decode.step", pytest.param("prefill.step", marks=pytest.mark.long)])
def test_a_step_that_hangs_is_left_behind_though_its_process_answers(split: Up, point: str) -> None:
    expect_whole(split)
    want = stream(split, {}, **OPTIONS)
    result: list[Any] = []
    split.points.arm(point, "hang")
    asked = threading.Thread(target=lambda: result.append(stream(split, {}, cache_salt=point, **OPTIONS)))
    asked.start()
    pid = split.points.wait_hit(point)
    stuck = next(worker for worker in split.state()["workers"] if worker["pid"] == pid)
    reasons: list[str] = []

    def is_hung() -> bool:
        reasons[:] = [split.client.get(f"{stuck['http']}/ready").text]
        return "hangs" in reasons[0]

    eventually(is_hung, 20, f"not ready ({reasons})")
    asked.join(60)
    split.points.release(point)
    assert result == [want]
    expect_whole(split)


@pytest.mark.long
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_stop_of_a_second_and_a_half_aborts_nothing(split: Up, role: str) -> None:
    expect_whole(split)
    want = stream(split, {}, **OPTIONS)
    before = retries(split)
    stopped: list[int] = []

    def stop() -> None:
        worker_id = f"decode-{busy(split, 'decode')}" if role == "decode" else "prefill-0"
        stopped.append(pid_of(split, worker_id))
        os.kill(stopped[0], signal.SIGSTOP)
        threading.Timer(1.5, os.kill, (stopped[0], signal.SIGCONT)).start()
        eventually(lambda: process_state(stopped[0]) == "T", 1, "stopped")

    assert stream(split, {10: stop}, **OPTIONS) == want
    eventually(lambda: process_state(stopped[0]) != "T", 5, "running")
    time.sleep(0.5)
    assert retries(split) == before
    expect_whole(split)


@pytest.mark.long
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_frozen_group_is_left_behind(split: Up, version: str) -> None:
    folder = cgroups.freezers().get(version)
    if folder is None:
        pytest.skip(f"no freezer of cgroups {version} that we may use")
    expect_whole(split)
    want = stream(split, {}, **OPTIONS)
    with (
        cgroups.group(folder, pid_of(split, "decode-0")) as first,
        cgroups.group(folder, pid_of(split, "decode-1")) as second,
    ):
        groups = {"decode-0": first, "decode-1": second}

        def freeze() -> None:
            cgroups.freeze(groups[f"decode-{busy(split, 'decode')}"], frozen=True)

        try:
            assert stream(split, {10: freeze}, **OPTIONS) == want
        finally:
            for made in groups.values():
                cgroups.freeze(made, frozen=False)
    expect_whole(split)


@pytest.mark.long
@pytest.mark.skipif(not cgroups.has_cpu_quota(), reason="no CPU quota by cgroups v1 that we may use")
def test_a_worker_with_a_tenth_of_a_cpu_is_slow_and_not_dead(split: Up) -> None:
    expect_whole(split)
    want = stream(split, {}, **OPTIONS)
    with (
        cgroups.group(cgroups.V1_CPU, pid_of(split, "decode-0")) as first,
        cgroups.group(cgroups.V1_CPU, pid_of(split, "decode-1")) as second,
    ):
        for made in (first, second):
            cgroups.limit_cpu(made, 0.1)
        before = retries(split)
        assert stream(split, {}, **OPTIONS) == want
        assert cgroups.num_throttled(first) + cgroups.num_throttled(second) > 0
        assert retries(split) == before
        assert all_ready(split)
    expect_whole(split)


def gateway_pid(up: Up) -> int:
    return next(
        process.pid
        for process in psutil.Process(up.process.pid).children(recursive=True)
        if "gateway" in process.cmdline()
    )


@pytest.mark.long
@pytest.mark.skipif(not cgroups.has_cpu_quota(), reason="no CPU quota by cgroups v1 that we may use")
@pytest.mark.parametrize(("role", "share"), [("gateway", 0.03), ("prefill", 0.1)])
def test_a_gateway_or_prefill_worker_with_little_of_a_cpu_is_slow_and_not_dead(
    split: Up, role: str, share: float
) -> None:
    """A stream of this model takes less than a tenth of a CPU of the gateway."""
    expect_whole(split)
    want = stream(split, {}, **OPTIONS)
    pids = [pid_of(split, f"prefill-{n}") for n in (0, 1)] if role == "prefill" else [gateway_pid(split)]
    before = retries(split)
    with contextlib.ExitStack() as stack:
        groups = [stack.enter_context(cgroups.group(cgroups.V1_CPU, pid)) for pid in pids]
        for made in groups:
            cgroups.limit_cpu(made, share)
        for number in range(3):
            assert stream(split, {}, cache_salt=f"slow {role} {number}", **OPTIONS) == want
        assert sum(map(cgroups.num_throttled, groups)) > 0
        assert retries(split) == before
        assert all_ready(split)
    expect_whole(split)


@pytest.mark.long
@pytest.mark.skipif(not cgroups.has_memory_limit(), reason="no memory limit by cgroups v1 that we may use")
def test_a_worker_that_is_killed_for_memory_costs_no_token(split: Up) -> None:
    expect_whole(split)
    want = stream(split, {}, **OPTIONS)
    killed: list[int] = []
    folder = cgroups.V1_MEMORY / f"tandem-{os.getpid()}"
    folder.mkdir()

    def starve() -> None:
        killed.append(pid_of(split, f"decode-{busy(split, 'decode')}"))
        cgroups.limit_memory(folder, 4096)
        (folder / "cgroup.procs").write_text(str(killed[0]))

    try:
        assert stream(split, {10: starve}, **OPTIONS) == want
        eventually(lambda: process_state(killed[0]) in (None, "Z"), 30, "the end of the worker")
    finally:
        eventually(lambda: not (folder / "cgroup.procs").read_text(), 30, "an empty group")
        folder.rmdir()
    expect_whole(split)
