"""Everything that can go wrong, as one tree; each class fixes its gRPC code and HTTP status.

    TandemError
    ├── InvalidRequest          INVALID_ARGUMENT    400   names the field
    │   ├── ContextLengthExceeded
    │   └── Quarantined                             workers died of it
    ├── Unauthenticated         UNAUTHENTICATED     401   no key, or a wrong one
    ├── NotFound                NOT_FOUND           404
    ├── AlreadyExists           ALREADY_EXISTS      409
    ├── PayloadTooLarge         INVALID_ARGUMENT    413
    ├── Overloaded              RESOURCE_EXHAUSTED  429   retry hint
    ├── Cancelled               CANCELLED           499
    ├── Internal                INTERNAL            500
    ├── Unavailable             UNAVAILABLE         503   retry hint
    ├── DeadlineExceeded        DEADLINE_EXCEEDED   504
    ├── Preempted               ABORTED             503   given up for others; another attempt goes on
    ├── Mismatch                FAILED_PRECONDITION 409   names the fields that differ
    └── StartupError            a process cannot start: one line, exit code 2
        └── CheckpointError     names file, key and what was expected

Standard library only: every layer may import this module.
"""

from typing import ClassVar


class TandemError(Exception):
    """Base of all errors that cross a boundary. `reason` is the machine-readable UPPER_SNAKE name."""

    code: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500
    reason: ClassVar[str] = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        retry_after_s: float | None = None,
        retryable: bool = False,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s
        self.retryable = retryable


class InvalidRequest(TandemError):
    """The request itself is wrong; `field` says where."""

    code = "INVALID_ARGUMENT"
    http_status = 400
    reason = "INVALID_ARGUMENT"


class ContextLengthExceeded(InvalidRequest):
    """Prompt plus max_tokens do not fit the model's context."""

    reason = "CONTEXT_LENGTH_EXCEEDED"


class Quarantined(InvalidRequest):
    """Workers have died of this request; it is not tried again for a while."""

    reason = "QUARANTINED"


class Unauthenticated(TandemError):
    """The caller shows no key, or none that is known."""

    code = "UNAUTHENTICATED"
    http_status = 401
    reason = "UNAUTHENTICATED"


class NotFound(TandemError):
    """Unknown model, route or request."""

    code = "NOT_FOUND"
    http_status = 404
    reason = "NOT_FOUND"


class AlreadyExists(TandemError):
    """A live request has this id."""

    code = "ALREADY_EXISTS"
    http_status = 409
    reason = "ALREADY_EXISTS"


class PayloadTooLarge(TandemError):
    """The body is over the limit."""

    code = "INVALID_ARGUMENT"
    http_status = 413
    reason = "PAYLOAD_TOO_LARGE"


class Overloaded(TandemError):
    """A bounded queue is full."""

    code = "RESOURCE_EXHAUSTED"
    http_status = 429
    reason = "OVERLOADED"


class Cancelled(TandemError):
    """The client went away or asked for Abort."""

    code = "CANCELLED"
    http_status = 499
    reason = "CANCELLED"


class Internal(TandemError):
    """Our own fault."""


class Unavailable(TandemError):
    """No worker can serve this now."""

    code = "UNAVAILABLE"
    http_status = 503
    reason = "UNAVAILABLE"


class LinkFailed(Unavailable):
    """The KV link between two workers failed under a request; either of them may be to blame."""


class DeadlineExceeded(TandemError):
    """The request's time is over."""

    code = "DEADLINE_EXCEEDED"
    http_status = 504
    reason = "DEADLINE_EXCEEDED"


class Preempted(TandemError):
    """A worker needs the request's memory for others; another attempt goes on where it stopped."""

    code = "ABORTED"
    http_status = 503
    reason = "PREEMPTED"


class Mismatch(TandemError):
    """Two peers do not fit together; the message names the fields that differ."""

    code = "FAILED_PRECONDITION"
    http_status = 409
    reason = "MISMATCH"


class StartupError(TandemError):
    """A process cannot start. Printed as one line; the process exits with code 2."""

    reason = "STARTUP"


class CheckpointError(StartupError):
    """A checkpoint is broken or unsupported: which file, which key, what was expected."""

    reason = "CHECKPOINT"

    def __init__(self, file: str, key: str | None, expected: str) -> None:
        where = f"{file}: {key}" if key else file
        super().__init__(f"{where}: {expected}")
