"""How full the memory is, from trees of files as kernels write them, and what follows from it."""

import pytest

from runtime.clock import ManualClock
from runtime.errors import Overloaded
from runtime.memory_guard import LOOK_S, MemoryGuard, MemoryView

GIB = 1 << 30
UNLIMITED_V1 = 0x7FFFFFFFFFFFF000


@pytest.fixture
def machine(tmp_path):
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "cgroup").mkdir()
    return tmp_path


def meminfo(machine, total_kib, available_kib):
    text = (
        f"MemTotal:  {total_kib} kB\nMemFree: 5 kB\nMemAvailable:    {available_kib} kB\nHugePages_Total: 0\n"
    )
    (machine / "proc" / "meminfo").write_text(text)


def member(machine, *lines):
    (machine / "proc" / "self" / "cgroup").write_text("".join(f"{line}\n" for line in lines))


def v1(machine, path, limit, usage, idle=0):
    folder = machine / "cgroup" / "memory" / path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{usage}\n")
    files = f"total_active_file {idle - 1}\ntotal_inactive_file 1\n"
    (folder / "memory.stat").write_text(f"active_file 7\n{files}")


def v2(machine, path, limit, usage, idle=0):
    folder = machine / "cgroup" / path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon 1\nactive_file 0\ninactive_file {idle}\n")


def share(machine):
    return MemoryView(machine / "proc", machine / "cgroup").share()


def test_without_a_limit_the_machine_counts(machine):
    meminfo(machine, 1000, 250)
    assert share(machine) == 0.75
    member(machine, "0::/app")
    v2(machine, "app", "max", 99 * GIB)
    assert share(machine) == 0.75
    member(machine, "4:memory:/app")
    v1(machine, "app", UNLIMITED_V1, 99 * GIB)
    assert share(machine) == 0.75


@pytest.mark.parametrize(("line", "write"), [("0::/outer/app", v2), ("7:cpu,memory:/outer/app", v1)])
def test_the_nearest_limit_of_nested_groups_counts(machine, line, write):
    meminfo(machine, 1000, 900)
    member(machine, "3:cpuset:/elsewhere", line)
    write(machine, "outer/app", 4 * GIB, 2 * GIB)
    assert share(machine) == 0.5
    write(machine, "outer", 10 * GIB, 9 * GIB)
    assert share(machine) == 0.9
    write(machine, "outer/app", 4 * GIB, 4 * GIB)
    assert share(machine) == 1.0


@pytest.mark.parametrize(("line", "write"), [("0::/app", v2), ("7:memory:/app", v1)])
def test_what_can_be_taken_back_is_not_used(machine, line, write):
    meminfo(machine, 1000, 1000)
    member(machine, line)
    write(machine, "app", 4 * GIB, 4 * GIB, idle=3 * GIB)
    assert share(machine) == 0.25


@pytest.mark.parametrize(("line", "write"), [("0::/docker/0123", v2), ("7:memory:/docker/0123", v1)])
def test_in_a_container_the_group_is_the_root(machine, line, write):
    meminfo(machine, 1000, 1000)
    member(machine, line)
    write(machine, "", 2 * GIB, 1 * GIB)
    assert share(machine) == 0.5


def test_a_group_that_goes_away_and_a_system_without_any(machine):
    assert share(machine) == 0.0
    member(machine, "0::/app")
    v2(machine, "app", GIB, GIB)
    view = MemoryView(machine / "proc", machine / "cgroup")
    assert view.share() == 1.0
    (machine / "cgroup" / "app" / "memory.stat").unlink()
    assert view.share() == 0.0


def test_this_machine_can_be_read():
    assert 0 < MemoryView().share() < 1.1


def test_the_guard_refuses_above_its_share_and_looks_now_and_then(caplog):
    clock, shares = ManualClock(), [0.5, 0.96, 0.97, 0.95]
    guard = MemoryGuard(0.95, lambda: shares.pop(0), clock)
    for _ in range(3):
        guard.check()
    assert len(shares) == 3
    for left in (2, 1):
        clock.advance(LOOK_S)
        for _ in range(2):
            with pytest.raises(Overloaded) as refused:
                guard.check()
            assert (refused.value.retryable, refused.value.retry_after_s) == (True, 1.0)
        assert len(shares) == left
    clock.advance(LOOK_S)
    guard.check()
    assert [record.getMessage() for record in caplog.records] == [
        "96.0 % of the memory is used: new requests are refused"
    ]


def test_a_share_of_one_refuses_nobody():
    MemoryGuard(1.0, lambda: 1.0).check()
