"""Keeps this worker registered with its gateways: facts first, then a heartbeat each interval.

A heartbeat says that the engine moves, not that the event loop does: while a step hangs the worker is down,
and it registers again when the step has ended after all.
"""

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Callable

import grpc

from protos.tandem.v1 import common_pb2, registry_pb2, registry_pb2_grpc
from runtime import rpc
from runtime.limits import HEARTBEAT_INTERVAL_S

logger = logging.getLogger(__name__)

FINAL = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNAUTHENTICATED)
"""Answers that no waiting changes."""

RECONNECT_S = (0.1, 1.0)
"""First and longest pause between two tries to reach a gateway."""


class Membership:
    """What this worker says of itself; `run` says it to every gateway until cancelled."""

    def __init__(
        self,
        info: registry_pb2.WorkerInfo,
        gateways: list[str],
        credentials: tuple[tuple[str, str], ...] = (),
        is_hung: Callable[[], bool] = lambda: False,
    ) -> None:
        """`credentials` is the metadata that gateways ask of calls. While it `is_hung` the worker is down."""
        self._is_hung = is_hung
        self._credentials = credentials
        self._refusals: defaultdict[str, set[str]] = defaultdict(set)
        self._info = info
        self._gateways = gateways
        self._state = common_pb2.WORKER_STATE_READY
        self._changed: set[asyncio.Event] = set()

    def drain(self) -> None:
        """Tell every gateway at once that no new work is wanted."""
        self._state = common_pb2.WORKER_STATE_DRAINING
        for event in self._changed:
            event.set()

    async def run(self) -> None:
        """One registration per gateway, reopened whenever it breaks."""
        async with asyncio.TaskGroup() as tasks:
            for address in self._gateways:
                tasks.create_task(self._stay_registered(address))

    async def _stay_registered(self, address: str) -> None:
        pause_s, longest_s = RECONNECT_S
        async with rpc.channel(address) as channel:
            while True:
                while self._is_hung():
                    await asyncio.sleep(HEARTBEAT_INTERVAL_S)
                if await self._register(channel, address):
                    pause_s = RECONNECT_S[0]
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, longest_s)

    async def _register(self, channel: grpc.aio.Channel, address: str) -> bool:
        """One stream to its end; True if the gateway had accepted this worker."""
        accepted = False
        changed = asyncio.Event()
        self._changed.add(changed)
        stub = registry_pb2_grpc.RegistryServiceStub(channel)
        call = stub.Register(self._messages(changed), metadata=self._credentials)
        try:
            async for response in call:
                if response.HasField("registered") and not accepted:
                    accepted = True
                    self._refusals.pop(address, None)
                    logger.info("registered with gateway %s at %s", response.registered.gateway_id, address)
        except grpc.aio.AioRpcError as error:
            self._say_why(address, error)
        finally:
            self._changed.discard(changed)
            call.cancel()
        return accepted

    def _say_why(self, address: str, error: grpc.aio.AioRpcError) -> None:
        """A refusal that an operator must do something about is an error, but is said once."""
        reason = f"{error.code().name} {error.details()}"
        level = logging.ERROR if error.code() in FINAL else logging.INFO
        if reason in self._refusals[address]:
            level = logging.DEBUG
        self._refusals[address].add(reason)
        logger.log(level, "gateway %s: %s", address, reason)

    async def _messages(self, changed: asyncio.Event) -> AsyncIterator[registry_pb2.RegisterRequest]:
        yield registry_pb2.RegisterRequest(info=self._info)
        sequence = 0
        while True:
            state = common_pb2.WORKER_STATE_DOWN if self._is_hung() else self._state
            heartbeat = registry_pb2.Heartbeat(sequence=sequence, state=state)
            yield registry_pb2.RegisterRequest(heartbeat=heartbeat)
            sequence += 1
            try:
                async with asyncio.timeout(HEARTBEAT_INTERVAL_S):
                    await changed.wait()
                changed.clear()
            except TimeoutError:
                pass
