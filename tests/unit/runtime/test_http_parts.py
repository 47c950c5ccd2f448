"""Parts written past ASGI beside the same parts sent through it."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from runtime.http_parts import PartWriter


class Wire:
    """What a transport was given."""

    def __init__(self) -> None:
        self.said: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.said.append(data)


def at_once(work: Coroutine[Any, Any, None]) -> None:
    """Do what never waits, without an event loop for each example."""
    with pytest.raises(StopIteration):
        work.send(None)


def started() -> tuple[RequestResponseCycle, Wire]:
    """An answer whose head is out, and a wire without it."""
    wire: Any = Wire()
    scope: Any = {"type": "http", "method": "POST"}
    logger = logging.getLogger()
    cycle = RequestResponseCycle(
        scope=scope,
        transport=wire,
        flow=FlowControl(wire),
        logger=logger,
        access_logger=logger,
        access_log=False,
        default_headers=[],
        message_event=asyncio.Event(),
        expect_100_continue=False,
        keep_alive=True,
        on_response=lambda: None,
    )
    at_once(cycle.send({"type": "http.response.start", "status": 200, "headers": []}))
    wire.said.clear()
    return cycle, wire


@given(st.lists(st.tuples(st.binary(min_size=1, max_size=40), st.booleans()), max_size=5))
def test_parts_are_what_asgi_sends(parts: list[tuple[bytes, bool]]) -> None:
    (ours, our_wire), (other, other_wire) = started(), started()
    writer = PartWriter(ours)
    for part, is_gone in parts:
        ours.disconnected = other.disconnected = ours.disconnected or is_gone
        writer.write(part)
        at_once(other.send({"type": "http.response.body", "body": part, "more_body": True}))
    assert our_wire.said == other_wire.said


async def test_drained_waits_for_a_full_connection_only() -> None:
    cycle, _ = started()
    writer = PartWriter(cycle)
    await writer.drained()
    cycle.flow.pause_writing()
    assert writer.is_full
    waiter = asyncio.ensure_future(writer.drained())
    await asyncio.sleep(0)
    assert not waiter.done()
    cycle.flow.resume_writing()
    await waiter
    assert not writer.is_full
