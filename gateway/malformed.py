"""A message that is no protobuf is the client's fault: INVALID_ARGUMENT, where grpc says UNKNOWN."""

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from runtime import rpc
from runtime.errors import InvalidRequest


class MalformedMessages(grpc.aio.ServerInterceptor):  # type: ignore[misc] # grpc is untyped
    """Decodes the requests of one service itself, so that a decode error meets our translation.

    Its streaming methods write to the context. As generators, one around the other, they would cost more for
    every message.
    """

    def __init__(self, service: str) -> None:
        self._prefix = f"/{service}/"

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The handler of this method, taking raw bytes."""
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(self._prefix):
            return handler
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                _decoding(handler, handler.unary_stream), response_serializer=handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            _decoding(handler, handler.unary_unary), response_serializer=handler.response_serializer
        )


def _decoding(
    handler: Any, method: Callable[[Any, Any], Awaitable[Any]]
) -> Callable[[bytes, Any], Awaitable[Any]]:
    async def call(raw: bytes, context: Any) -> Any:
        async with rpc.translated(context):
            request = _decode(handler, raw)
        return await method(request, context)

    return call


def _decode(handler: Any, raw: bytes) -> Any:
    try:
        return handler.request_deserializer(raw)
    except DecodeError:
        raise InvalidRequest("the message is not valid protobuf") from None
