"""The prefill worker's gRPC face for gateways: converts and delegates."""

from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from protos.tandem.v1 import common_pb2, prefill_pb2, prefill_pb2_grpc
from runtime import rpc
from worker.bridge import EngineBridge


class PrefillServicer(prefill_pb2_grpc.PrefillServiceServicer):
    """One Attach stream per gateway process."""

    def __init__(self, bridge: EngineBridge) -> None:
        self._bridge = bridge

    async def Attach(
        self,
        requests: AsyncIterator[prefill_pb2.PrefillServiceAttachRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[prefill_pb2.PrefillServiceAttachResponse]:
        """All requests of one gateway, until either side ends the stream."""
        async with rpc.translated(context):
            async for event in self._bridge.hub.serve(_commands(requests)):
                yield prefill_pb2.PrefillServiceAttachResponse(event=event)


async def _commands(
    requests: AsyncIterator[prefill_pb2.PrefillServiceAttachRequest],
) -> AsyncIterator[common_pb2.AttachCommand]:
    async for request in requests:
        yield request.command
