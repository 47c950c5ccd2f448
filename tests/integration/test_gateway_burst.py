"""More calls at once than gRPC would let wait by itself."""

import asyncio
from collections import Counter

import grpc.aio
from grpc_health.v1 import health_pb2

from tests.fakes.cluster import cluster

NUM_CALLS = 1_400


async def test_no_call_of_a_burst_is_cancelled() -> None:
    async with cluster() as made, grpc.aio.insecure_channel(made.grpc) as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        request = health_pb2.HealthCheckRequest().SerializeToString()
        # The event loop, which is the server's too, takes none of them before all have been made.
        calls = [check(request, wait_for_ready=True) for _ in range(NUM_CALLS)]
        codes = Counter(await asyncio.gather(*(call.code() for call in calls)))
    assert codes == {grpc.StatusCode.OK: NUM_CALLS}
