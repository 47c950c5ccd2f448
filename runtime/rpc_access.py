"""Keys for gRPC: every method but the health service's needs one, whichever service it belongs to."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from runtime import rpc
from runtime.access import INTERNAL_SECRET_SETTING, Keys
from runtime.errors import Unauthenticated

HEALTH = "grpc.health.v1.Health"

OPEN_METHODS = frozenset(f"/{HEALTH}/{name}" for name in ("Check", "List", "Watch"))
"""Say nothing but whether a service serves."""

INTERNAL_REFUSAL = (
    f"the internal secret is missing or wrong: give every process the same {INTERNAL_SECRET_SETTING}"
)

PUBLIC_REFUSAL = "an API key is needed: send `authorization: Bearer KEY`"


REFUSAL_DELAY_S = 0.1
"""Before a refusal: grpc.aio tells a client that is cut off in mid-message INTERNAL, not the status."""


class KeyGuard(grpc.aio.ServerInterceptor):  # type: ignore[misc] # grpc is untyped
    """Refuses calls without one of `keys` before a message of theirs is read; without keys all may call."""

    def __init__(self, keys: Keys, refusal: str) -> None:
        self._keys = keys
        # Of this kind whatever the method's own is: it answers without waiting for a message.
        self._refused = grpc.stream_stream_rpc_method_handler(self._refuse)
        self._refusal = refusal

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The method's handler, or the refusal."""
        if not self._keys or handler_call_details.method in OPEN_METHODS:
            return await continuation(handler_call_details)
        metadata = handler_call_details.invocation_metadata or ()
        given = [value for name, value in metadata if name == "authorization"]
        return await continuation(handler_call_details) if self._keys.admit(given) else self._refused

    async def _refuse(self, _: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await asyncio.sleep(REFUSAL_DELAY_S)
        await rpc.abort(context, Unauthenticated(self._refusal))
