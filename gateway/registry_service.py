"""The gateway's internal gRPC face: where workers register. Converts and delegates."""

from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from gateway.fleet import Fleet
from protos.tandem.v1 import registry_pb2, registry_pb2_grpc
from runtime import rpc
from runtime.errors import InvalidRequest, Unavailable
from runtime.limits import HEARTBEAT_INTERVAL_S


class RegistryServicer(registry_pb2_grpc.RegistryServiceServicer):
    """One Register stream per worker; its end takes the worker out at once."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def Register(
        self,
        requests: AsyncIterator[registry_pb2.RegisterRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[registry_pb2.RegisterResponse]:
        """Facts first, then heartbeats; each is acknowledged."""
        async with rpc.translated(context):
            first = await anext(requests, None)
            if first is None or not first.HasField("info"):
                raise InvalidRequest("the first message must be info", field="info")
            registration = self._fleet.join(first.info)
            try:
                yield registry_pb2.RegisterResponse(registered=self._registered())
                async for request in requests:
                    yield self._beat(registration, request)
            finally:
                self._fleet.leave(registration)

    def _registered(self) -> registry_pb2.Registered:
        return registry_pb2.Registered(
            gateway_id=self._fleet.gateway_id, heartbeat_interval_ms=int(HEARTBEAT_INTERVAL_S * 1000)
        )

    def _beat(
        self, registration: Any, request: registry_pb2.RegisterRequest
    ) -> registry_pb2.RegisterResponse:
        if not self._fleet.heartbeat(registration, request.heartbeat.state):
            raise Unavailable("this registration has lapsed; register again")
        ack = registry_pb2.HeartbeatAck(sequence=request.heartbeat.sequence)
        return registry_pb2.RegisterResponse(ack=ack)
