"""What `tandem up` does about a child that keeps dying, and about one that is of no use."""

import asyncio
import logging
import os
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from runtime.lifecycle import Shutdown
from tandem import fleet as fleet_module
from tandem.fleet import Fleet, FleetPlan
from tandem.restarts import MAX_CRASHES
from tandem.stuck import StuckWorkers

pytestmark = pytest.mark.e2e

FAKE = str(Path(__file__).with_name("fake_process.py"))


def plan(directory: Path) -> FleetPlan:
    """A fake gateway and two fake workers, of which the first may crash."""

    def command(*words: str) -> Any:
        return lambda _: [sys.executable, "-S", FAKE, *words]

    return FleetPlan(
        gateway=command("gateway", "--http-port=0", "--internal-port=0"),
        workers={name: command("decode", f"--worker-id={name}") for name in ("decode-0", "decode-1")},
        env={"FAKE_DIR": str(directory), "FAKE_CRASH": "decode-0", "PATH": os.environ["PATH"]},
        first_restart_delay_s=0.01,
        restart_stuck_after_s=0.2,
    )


async def test_a_child_that_keeps_dying_stays_down_and_the_others_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    shutdown, ready = Shutdown(), asyncio.Event()
    fleet = Fleet(plan(tmp_path), say=lambda _: None)
    serving = asyncio.ensure_future(fleet.serve(shutdown, lambda _: ready.set()))
    async with asyncio.timeout(20):
        await ready.wait()
        before = {member.name: member.child.pid for member in fleet.members if member.child}
        (tmp_path / "crash").touch()
        while "stays down" not in caplog.text:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)  # it is not started once more
    after = {member.name: member.child.pid for member in fleet.members if member.child}
    assert not serving.done()
    assert {name for name in before if before[name] == after[name]} == {"gateway", "decode-1"}
    (line,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert line.getMessage() == (
        f"decode-0 died {MAX_CRASHES} times within 60 s and stays down: decode-0 was killed by signal 9"
    )
    waits = [
        record.getMessage().rsplit(" in ", 1)[1] for record in caplog.records if "again" in record.message
    ]
    assert waits == ["0.0 s", "0.0 s", "0.0 s", "0.1 s"]
    shutdown.request("the test is over")
    async with asyncio.timeout(10):
        await serving
    assert all(member.ended.is_set() for member in fleet.members)


async def test_a_worker_that_lives_and_does_not_serve_is_started_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_module, "LOOK_S", 0.05)
    served: set[int] = set()
    observe = StuckWorkers.observe

    def noting(self: StuckWorkers, alive: Collection[int], useful: Collection[int]) -> list[int]:
        served.update(useful)
        return observe(self, alive, useful)

    monkeypatch.setattr(StuckWorkers, "observe", noting)
    shutdown, ready = Shutdown(), asyncio.Event()
    fleet = Fleet(plan(tmp_path), say=lambda _: None)
    serving = asyncio.ensure_future(fleet.serve(shutdown, lambda _: ready.set()))
    async with asyncio.timeout(20):
        await ready.wait()
        before = {member.name: member.pid for member in fleet.members}
        while before["decode-1"] not in served:
            await asyncio.sleep(0.01)
        (tmp_path / "stuck").write_text(str(before["decode-1"]))
        while "decode-1 lives and does not serve" not in caplog.text:
            await asyncio.sleep(0.01)
        while fleet.members[-1].pid == before["decode-1"]:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)  # nobody else, and not twice
    after = {member.name: member.pid for member in fleet.members}
    assert {name for name in before if before[name] == after[name]} == {"gateway", "decode-0"}
    assert caplog.text.count("does not serve") == 1
    shutdown.request("the test is over")
    async with asyncio.timeout(10):
        await serving
    assert all(member.ended.is_set() for member in fleet.members)
