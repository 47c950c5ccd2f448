"""gRPC servers, channels, and the one translation of our errors into statuses."""

import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from runtime.errors import Internal, StartupError, TandemError

logger = logging.getLogger(__name__)

KEEPALIVE = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)

ERROR_DOMAIN = "tandem"

MAX_UNTAKEN_CALLS = 16_384
"""Calls that have come and that the event loop has not taken yet. gRPC's own bounds are lower: of more than
1,000 it cancels some at random, though all of them would be admitted, or refused with a hint, in a moment."""


MAX_UNTAKEN_S = 600
"""How long they may wait: a call's own deadline ends it with the right status, gRPC's 30 s with CANCELLED."""


def server(
    interceptors: list[grpc.aio.ServerInterceptor], *, max_message_bytes: int, share_port: bool = False
) -> grpc.aio.Server:
    """A server that never shares its port by accident: other processes may listen there with `share_port`."""
    options = [
        *KEEPALIVE,
        ("grpc.so_reuseport", int(share_port)),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.server_max_unrequested_time_in_server", MAX_UNTAKEN_S),
        ("grpc.server.max_pending_requests", MAX_UNTAKEN_CALLS),
        ("grpc.server.max_pending_requests_hard_limit", MAX_UNTAKEN_CALLS),
        ("grpc.max_receive_message_length", max_message_bytes),
    ]
    return grpc.aio.server(interceptors=interceptors, options=options)


def listen(to: grpc.aio.Server, host: str, port: int, flag: str) -> int:
    """Bind `host:port`; returns the port. StartupError names the flag when the address is taken."""
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        bound: int = to.add_insecure_port(target)
    except RuntimeError as error:
        raise StartupError(f"{flag} {port}: cannot listen on {target}") from error
    return bound


def channel(address: str, *, max_message_bytes: int = 64 * 1024 * 1024) -> grpc.aio.Channel:
    """A channel to one peer of ours; the caller closes it."""
    options = [
        *KEEPALIVE,
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        # A peer that restarts may come back at another address behind its name; the default is 30 s.
        ("grpc.dns_min_time_between_resolutions_ms", 1_000),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    return grpc.aio.insecure_channel(address, options=options)


def to_status(error: TandemError) -> status_pb2.Status:
    """google.rpc.Status with the details that clients read."""
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN)
    details: list[Any] = [info]
    if error.field is not None:
        info.metadata["field"] = error.field
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_s is not None:
        delay = Duration()
        delay.FromMilliseconds(int(error.retry_after_s * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(code=grpc.StatusCode[error.code].value[0], message=error.message)
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return status


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: TandemError) -> None:
    """End the call with this error; never returns."""
    rich = rpc_status.to_status(to_status(error))
    trailers = list(rich.trailing_metadata)
    if error.retry_after_s is not None:
        trailers.append(("grpc-retry-pushback-ms", str(int(error.retry_after_s * 1000))))
    await context.abort(rich.code, rich.details, tuple(trailers))


@contextlib.asynccontextmanager
async def translated(context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[None]:
    """The edge of a servicer: TandemError becomes a status, anything else INTERNAL without details."""
    try:
        yield
    except TandemError as error:
        await abort(context, error)
    except (grpc.aio.AbortError, GeneratorExit):
        raise
    except Exception:
        logger.exception("unexpected error in a call")
        await abort(context, Internal("internal error"))
