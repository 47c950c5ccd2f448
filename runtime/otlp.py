"""OpenTelemetry's SDK behind our own few types: spans and histograms leave over OTLP, http/protobuf.

What the standard OTEL_* variables say holds: endpoint, headers, compression, sampler, batch sizes, resource.
Nothing is exported, and the SDK is not even imported, unless an endpoint is set.
"""

import logging
import os
import threading
from collections.abc import Callable, Mapping
from typing import Protocol

from runtime.tracing import Attributes, Tracer
from runtime.version import VERSION

logger = logging.getLogger(__name__)

FLUSH_TIMEOUT_S = 2.0
"""What is left at a process's end has this long to leave."""


class Histograms(Protocol):
    """Histograms of one process that leave over OTLP."""

    def record(self, name: str, value: float, attributes: Attributes) -> None:
        """Add a value to a histogram that was named at the start."""
        ...

    def close(self, timeout_s: float) -> None:
        """Send what is left; blocks at most so long."""
        ...


class NoHistograms:
    """Metrics are not exported."""

    def record(self, name: str, value: float, attributes: Attributes) -> None:
        """Nothing."""

    def close(self, timeout_s: float) -> None:
        """Nothing."""


def open_tracer(service: str, instance: str) -> Tracer:
    """The process's tracer, as the environment wants it; OTEL_SERVICE_NAME goes before `service`."""
    if not _exports("traces"):
        return Tracer()
    from runtime.otlp_sdk import SdkSink

    return Tracer(SdkSink(_resource(service, instance)))


def open_histograms(service: str, instance: str, buckets: Mapping[str, tuple[float, ...]]) -> Histograms:
    """Histograms in seconds with these advised boundaries, as the environment wants them."""
    if not _exports("metrics"):
        return NoHistograms()
    from runtime.otlp_sdk import SdkHistograms

    return SdkHistograms(_resource(service, instance), buckets)


def _exports(signal: str) -> bool:
    """Whether the environment names somebody who takes this signal."""
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    if os.environ.get(f"OTEL_{signal.upper()}_EXPORTER", "otlp").strip().lower() == "none":
        return False
    names = (f"OTEL_EXPORTER_OTLP_{signal.upper()}_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    if not any(os.environ.get(name) for name in names):
        return False
    if os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf") != "http/protobuf":
        logger.warning("OTEL_EXPORTER_OTLP_PROTOCOL: only http/protobuf is spoken; it is used")
    return True


def _resource(service: str, instance: str) -> Mapping[str, str]:
    return {"service.name": service, "service.instance.id": instance, "service.version": VERSION}


def within(timeout_s: float, work: Callable[[], object]) -> None:
    """Do something that may hang, on a thread that no exit waits for."""
    thread = threading.Thread(target=work, name="otlp-flush", daemon=True)
    thread.start()
    thread.join(timeout_s)
