"""Opens a link's lanes, one after another: both ends go through them in the same order."""

import asyncio
import itertools
from functools import partial

from kvtransfer.head_plan import stored_heads
from kvtransfer.lanes import SENDER, Lane, lanes_between
from kvtransfer.messages import Welcome
from runtime.errors import Unavailable
from runtime.limits import LINK_TIMEOUT_S
from worker.control_stream import ControlStream
from worker.lanes.link_lanes import LinkLanes
from worker.lanes.opening import Opening
from worker.lanes.transports import Exchange
from worker.main import WorkerParts

_numbers = itertools.count(1)
"""Of this process's links, for its other ranks."""


async def open_lanes(
    parts: WorkerParts, welcome: Welcome, stream: ControlStream, *, end: int, peer_size: int
) -> LinkLanes:
    """This end's lanes to a worker of so many ranks. Raises TransportBroken; Unavailable if the peer hangs.

    Whoever is cancelled meanwhile leaves a thread behind, at whose end they are closed.
    """
    loop = asyncio.get_running_loop()
    opening = loop.run_in_executor(None, _open, parts, welcome, stream.swap_from_thread, end, peer_size)
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        opening.add_done_callback(_close_unwanted)
        raise


def _close_unwanted(opening: "asyncio.Future[LinkLanes]") -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


def _open(parts: WorkerParts, welcome: Welcome, exchange: Exchange, end: int, peer_size: int) -> LinkLanes:
    cache, ranks = parts.engine.kv_cache, parts.engine.model.ranks
    num_kv_heads, own_size = parts.facts.groups[0].num_kv_heads, ranks.shard.size
    sizes = (own_size, peer_size) if end == SENDER else (peer_size, own_size)
    lanes = LinkLanes(next(_numbers), ranks, cache.pool.local)
    opening_of = partial(_opening, parts, welcome, end, own_size)
    try:
        for lane in lanes_between(num_kv_heads, welcome, *sizes):
            lanes.open(opening_of(lane), exchange, cache.groups[0].device)
    except TimeoutError as error:
        lanes.close()
        raise Unavailable(f"no rendezvous within {LINK_TIMEOUT_S} s", retryable=True) from error
    except BaseException:
        lanes.close()
        raise
    return lanes


def _opening(parts: WorkerParts, welcome: Welcome, end: int, own_size: int, lane: Lane) -> Opening:
    stored = stored_heads(parts.facts.groups[0].num_kv_heads, lane.rank(end), own_size)
    return Opening(
        transport=welcome.transport,
        end=end,
        lane=lane,
        first_head=lane.heads.offset(stored),
        num_slabs=welcome.num_slabs,
        hostname=parts.settings.kv_interface_host or parts.settings.host,
    )
