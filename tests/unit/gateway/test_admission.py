"""Slots, the queue, and everything that can happen to one who waits."""

import asyncio
from typing import Any

import pytest

from gateway.admission import Admission
from runtime.errors import Cancelled, DeadlineExceeded, Overloaded


class Scene:
    """Tasks that hold slots until told."""

    def __init__(self, max_running: int, max_waiting: int) -> None:
        self.admission = Admission(max_running, max_waiting)
        self.entered: list[int] = []
        self.leave: dict[int, asyncio.Event] = {}

    async def ask(self, request: int, timeout: float = 60) -> asyncio.Task[None]:
        self.leave[request] = asyncio.Event()
        task = asyncio.ensure_future(self._hold(request, timeout))
        await self.settle()
        return task

    async def settle(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)
        self.admission.check()

    async def release(self, request: int) -> None:
        self.leave[request].set()
        await self.settle()

    async def _hold(self, request: int, timeout: float) -> None:
        async with self.admission.slot(request, timeout):
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
