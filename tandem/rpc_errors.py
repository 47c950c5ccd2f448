"""From a gRPC status back to the error that the server raised: the inverse of runtime.rpc.to_status."""

from collections.abc import Iterator

import grpc
import grpc.aio
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from runtime.errors import (
    AlreadyExists,
    Cancelled,
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    Mismatch,
    NotFound,
    Overloaded,
    TandemError,
    Unauthenticated,
    Unavailable,
)
from runtime.rpc import ERROR_DOMAIN

BY_CODE: dict[str, type[TandemError]] = {
    cls.code: cls
    for cls in (
        InvalidRequest,
        Unauthenticated,
        NotFound,
        AlreadyExists,
        Overloaded,
        Cancelled,
        Internal,
        Unavailable,
        DeadlineExceeded,
        Mismatch,
    )
}
"""For a status without our ErrorInfo: from gRPC itself, or from a proxy between."""


def from_rpc_error(error: grpc.aio.AioRpcError, address: str) -> TandemError:
    """The error behind a failed call to `address`; keeps field and retry hint."""
    message = error.details() or error.code().name
    reason, field, retry_after_s = None, None, None
    for detail in _details(error):
        if isinstance(detail, error_details_pb2.ErrorInfo) and detail.domain == ERROR_DOMAIN:
            reason, field = detail.reason, detail.metadata.get("field")
        elif isinstance(detail, error_details_pb2.RetryInfo):
            retry_after_s = detail.retry_delay.ToTimedelta().total_seconds()
    cls = _by_reason().get(reason or "") or BY_CODE.get(error.code().name, Internal)
    if reason is None and cls is Unavailable:
        message = f"cannot reach {address} ({message.rpartition('last error: ')[2]})"
    retryable = cls in (Overloaded, Unavailable)
    return cls(message, field=field, retry_after_s=retry_after_s, retryable=retryable)


def _details(error: grpc.aio.AioRpcError) -> Iterator[Message]:
    try:
        status = rpc_status.from_call(error)
    except ValueError:  # details that contradict the status: a proxy's work
        return
    for packed in status.details if status is not None else ():
        for cls in (error_details_pb2.ErrorInfo, error_details_pb2.RetryInfo):
            detail = cls()
            if packed.Unpack(detail):
                yield detail


def _by_reason() -> dict[str, type[TandemError]]:
    found: dict[str, type[TandemError]] = {}
    pending = list(TandemError.__subclasses__())
    while pending:
        cls = pending.pop()
        found.setdefault(cls.reason, cls)
        pending += cls.__subclasses__()
    return found
