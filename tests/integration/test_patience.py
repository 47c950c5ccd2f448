"""A client that takes nothing is given up, one that is slow is not."""

import asyncio

import pytest

from gateway.patience import Patience


async def test_a_write_that_takes_too_long_is_cancelled() -> None:
    with Patience(0.03) as patience:
        patience.begin()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.Event().wait()
        assert patience.is_over
    task = asyncio.current_task()
    assert task is not None
    task.uncancel()


async def test_time_between_writes_does_not_count() -> None:
    with Patience(0.03) as patience:
        for _ in range(4):
            patience.begin()
            await asyncio.sleep(0.01)
            patience.end()
        await asyncio.sleep(0.06)
        assert not patience.is_over
