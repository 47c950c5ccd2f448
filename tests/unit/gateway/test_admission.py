"""Slots, the queue, and everything that can happen to one who waits."""

import asyncio
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.admission import Admission
from runtime.errors import Cancelled, DeadlineExceeded, Overloaded


class Scene:
    """Tasks that hold slots until told."""

    def __init__(self, max_running: int, max_waiting: int) -> None:
        self.admission = Admission(max_running, max_waiting)
        self.entered: list[int] = []
        self.leave: dict[int, asyncio.Event] = {}

    async def ask(self, request: int, timeout: float = 60, tenant: str = "") -> asyncio.Task[None]:
        self.leave[request] = asyncio.Event()
        task = asyncio.ensure_future(self._hold(request, timeout, tenant))
        await self.settle()
        return task

    async def settle(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)
        self.admission.check()

    async def release(self, request: int) -> None:
        self.leave[request].set()
        await self.settle()

    async def _hold(self, request: int, timeout: float, tenant: str) -> None:
        async with self.admission.slot(request, timeout, tenant):
            self.entered.append(request)
            await self.leave[request].wait()


async def ended(task: asyncio.Task[None]) -> Any:
    return (await asyncio.gather(task, return_exceptions=True))[0]


async def test_first_come_first_served_and_bounded() -> None:
    scene = Scene(1, 2)
    tasks = [await scene.ask(request) for request in (1, 2, 3, 4)]
    assert isinstance(error := await ended(tasks[3]), Overloaded)
    assert error.retry_after_s == 1.0
    assert (scene.admission.num_running, scene.admission.num_waiting) == (1, 2)
    for request in (1, 2, 3):
        await scene.release(request)
    assert scene.entered == [1, 2, 3]
    assert (scene.admission.num_running, scene.admission.num_waiting) == (0, 0)


async def test_deadline_and_interrupt_and_cancel() -> None:
    scene = Scene(1, 9)
    await scene.ask(1)
    late, aborted, cancelled = await scene.ask(2, 0), await scene.ask(3), await scene.ask(4)
    assert isinstance(await ended(late), DeadlineExceeded)
    scene.admission.interrupt(3, Cancelled("aborted"))
    assert isinstance(await ended(aborted), Cancelled)
    scene.admission.interrupt(99, Cancelled("nobody"))
    cancelled.cancel()
    assert isinstance(await ended(cancelled), asyncio.CancelledError)
    assert scene.admission.num_waiting == 0
    await scene.release(1)
    assert scene.admission.num_running == 0


async def test_slot_handed_to_a_cancelled_request_goes_on() -> None:
    scene = Scene(1, 9)
    await scene.ask(1)
    second = await scene.ask(2)
    await scene.ask(3)
    scene.leave[1].set()
    await asyncio.sleep(0)  # request 1 leaves: the slot is request 2's, which does not know yet
    await asyncio.sleep(0)
    second.cancel()
    await scene.settle()
    with pytest.raises(asyncio.CancelledError):
        await second
    assert scene.entered[-1] == 3
    await scene.release(3)
    assert scene.admission.num_running == 0


async def test_no_queue_at_all() -> None:
    scene = Scene(1, 0)
    await scene.ask(1)
    assert isinstance(await ended(await scene.ask(2)), Overloaded)
    await scene.release(1)
    await scene.ask(3)
    assert scene.entered == [1, 3]
    await scene.release(3)


async def test_a_greedy_tenant_keeps_nobody_else_waiting() -> None:
    scene = Scene(2, 4)
    greedy = [await scene.ask(request, tenant="greedy") for request in range(6)]
    modest = await scene.ask(10, tenant="modest")
    assert isinstance(await ended(greedy[5]), Overloaded)  # its newest makes room
    assert not modest.done()
    await scene.release(0)
    assert scene.entered == [0, 1, 10]
    await scene.release(1)
    assert scene.entered == [0, 1, 10, 2]


async def test_equal_tenants_take_turns() -> None:
    scene = Scene(1, 9)
    await scene.ask(0, tenant="x")
    for request in range(1, 7):
        await scene.ask(request, tenant="abc"[request % 3])
    for request in (0, 1, 2, 3, 4, 5, 6):
        await scene.release(request)
    assert scene.entered == [0, 1, 2, 3, 4, 5, 6]


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["ask", "ask", "leave", "cancel", "interrupt"]), st.integers(0, 30)),
    max_size=40,
)


async def play(operations: list[tuple[str, int]]) -> None:
    scene, tasks, tenants = Scene(2, 3), dict[int, asyncio.Task[None]](), dict[int, str]()
    for number, (what, value) in enumerate(operations):
        others = {request: task for request, task in tasks.items() if not task.done()}
        running = [request for request in scene.entered if request in others]
        waiting = [request for request in others if request not in running]
        if what == "ask":
            tenants[number] = "aaab"[value % 4]
            tasks[number] = await scene.ask(number, tenant=tenants[number])
        elif what == "leave" and running:
            num_entered = len(scene.entered)
            gone = running.pop(value % len(running))
            await scene.release(gone)
            for request in scene.entered[num_entered:]:
                share = Counter(tenants[each] for each in running)
                assert share[tenants[request]] == min(share[tenants[each]] for each in waiting)
        elif what == "cancel" and others:
            tasks[sorted(others)[value % len(others)]].cancel()
            await scene.settle()
        elif what == "interrupt" and waiting:
            scene.admission.interrupt(waiting[value % len(waiting)], Cancelled("aborted"))
            await scene.settle()
    for task in tasks.values():
        task.cancel()
    await asyncio.gather(*tasks.values(), return_exceptions=True)
    scene.admission.check()
    assert (scene.admission.num_running, scene.admission.num_waiting) == (0, 0)


@settings(max_examples=30, deadline=None)
@given(OPERATIONS)
def test_slots_go_to_who_has_fewest(operations: list[tuple[str, int]]) -> None:
    asyncio.run(play(operations))
