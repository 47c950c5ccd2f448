"""Traces: finished spans, recorded from timestamps.

1. A process has one Tracer. `Tracer.span` draws the ids of a span, so that they can travel to other processes
   at once; the span itself is recorded by `end`, its parts by `child`, whenever their times are known. No
   span is ever current: nothing spans a yield, and a step of the engine costs nothing.
2. Times are readings of SystemClock in seconds; `runtime.clock.unix_ns` turns them into dates.
3. Without an OTLP endpoint, or if the sampler says no, a span is a `Span`, whose methods do nothing.

The context that travels is W3C Trace Context's `traceparent`.
"""

import hashlib
import random
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from runtime.clock import unix_ns

AttributeValue = str | int | float | bool | Sequence[str]
Attributes = Mapping[str, AttributeValue]

NO_ATTRIBUTES: Attributes = {}

TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


class SpanContext(NamedTuple):
    """What names a span everywhere."""

    trace_id: int
    """128 bits, not 0."""
    span_id: int
    """64 bits, not 0."""
    sampled: bool
    """Whether it is recorded."""

    @property
    def traceparent(self) -> str:
        """As it travels."""
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-{self.sampled:02x}"

    def derived_id(self, *names: object) -> int:
        """The id of a span below this one that another process can work out: a hash, never 0."""
        text = f"{self.trace_id:032x}{self.span_id:016x}" + "/".join(map(str, names))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") or 1


def parse_traceparent(text: str) -> SpanContext | None:
    """The context in a `traceparent`; None for whatever W3C calls invalid, which starts a new trace."""
    match = TRACEPARENT.fullmatch(text.strip())
    if match is None or (text.startswith("00") and match.group(4)):
        return None
    trace_id, span_id, flags = (int(part, 16) for part in match.groups()[:3])
    return SpanContext(trace_id, span_id, bool(flags & 1)) if trace_id and span_id else None


class Event(NamedTuple):
    """Something that happened at one moment of a span."""

    name: str
    time_ns: int
    attributes: Attributes


class SpanRecord(NamedTuple):
    """A finished span as it leaves the process; times are Unix nanoseconds."""

    name: str
    is_server: bool
    context: SpanContext
    parent: SpanContext | None
    parent_is_remote: bool
    start_ns: int
    end_ns: int
    attributes: Attributes
    events: Sequence[Event]
    links: Sequence[SpanContext]
    error: str | None
    """Set if the span failed: the status's description."""


class Sink(Protocol):
    """Where spans go. Thread-safe, never blocks, bounded."""

    def samples(self, name: str, trace_id: int, parent: SpanContext | None) -> bool:
        """Whether a span without a local parent is recorded."""
        ...

    def emit(self, record: SpanRecord) -> None:
        """Take a finished span."""
        ...

    def close(self, timeout_s: float) -> None:
        """Send what is left; blocks at most so long."""
        ...


class Span:
    """A span that is not recorded; `RecordedSpan` is one that is."""

    recording = False

    def __init__(self, traceparent: str = "") -> None:
        self.traceparent = traceparent
        """The context that other processes get."""

    @property
    def trace_id(self) -> str | None:
        """Hexadecimal id of the trace; None if there is none."""
        return None

    def child(
        self,
        name: str,
        start_s: float,
        end_s: float,
        attributes: Attributes = NO_ATTRIBUTES,
        *,
        error: str | None = None,
    ) -> None:
        """Record a finished part of this span."""

    def event(self, name: str, at_s: float, attributes: Attributes = NO_ATTRIBUTES) -> None:
        """Note a moment."""

    def end(self, end_s: float, attributes: Attributes = NO_ATTRIBUTES, *, error: str | None = None) -> None:
        """Record the span; called once."""


class RecordedSpan(Span):
    """A span with its ids drawn and its end open; belongs to one thread."""

    recording = True

    def __init__(
        self,
        sink: Sink,
        name: str,
        context: SpanContext,
        parent: SpanContext | None,
        start_s: float,
        links: Sequence[SpanContext],
    ) -> None:
        super().__init__(context.traceparent)
        self._sink = sink
        self._name = name
        self._context = context
        self._parent = parent
        self._start_s = start_s
        self._links = links
        self._events: list[Event] = []

    @property
    def trace_id(self) -> str | None:
        """Hexadecimal id of the trace."""
        return f"{self._context.trace_id:032x}"

    def child(
        self,
        name: str,
        start_s: float,
        end_s: float,
        attributes: Attributes = NO_ATTRIBUTES,
        *,
        error: str | None = None,
    ) -> None:
        """Record a finished part of this span."""
        context = self._context._replace(span_id=new_span_id())
        start_ns, end_ns = unix_ns(start_s), unix_ns(end_s)
        self._sink.emit(
            SpanRecord(
                name, False, context, self._context, False, start_ns, end_ns, attributes, (), (), error
            )
        )

    def event(self, name: str, at_s: float, attributes: Attributes = NO_ATTRIBUTES) -> None:
        """Note a moment."""
        self._events.append(Event(name, unix_ns(at_s), attributes))

    def end(self, end_s: float, attributes: Attributes = NO_ATTRIBUTES, *, error: str | None = None) -> None:
        """Record the span; called once."""
        start_ns, end_ns = unix_ns(self._start_s), unix_ns(end_s)
        self._sink.emit(
            SpanRecord(
                self._name, True, self._context, self._parent, True, start_ns, end_ns,
                attributes, self._events, self._links, error,
            )
        )  # fmt: skip


class Tracer:
    """Starts spans; without a sink they are not recorded."""

    def __init__(self, sink: Sink | None = None) -> None:
        self._sink = sink

    def span(self, name: str, start_s: float, traceparent: str, attempt: int | None = None) -> Span:
        """A span of this process below the context that came from outside; the root of a trace without one.

        With an attempt, its id follows from the parent, the name and the attempt, and each attempt but the
        first is linked to the one before it, whichever process that ran in.
        """
        if self._sink is None:
            return Span(traceparent)
        parent = parse_traceparent(traceparent)
        trace_id = parent.trace_id if parent else random.getrandbits(128) or 1
        sampled = self._sink.samples(name, trace_id, parent)
        links: list[SpanContext] = []
        span_id = new_span_id()
        if parent is not None and attempt is not None:
            span_id = parent.derived_id(name, attempt)
            if attempt > 0:
                links.append(SpanContext(trace_id, parent.derived_id(name, attempt - 1), sampled))
        context = SpanContext(trace_id, span_id, sampled)
        if not sampled:
            return Span(context.traceparent)
        return RecordedSpan(self._sink, name, context, parent, start_s, links)

    def close(self, timeout_s: float) -> None:
        """Send what is left; blocks at most so long."""
        if self._sink is not None:
            self._sink.close(timeout_s)


def new_span_id() -> int:
    """64 random bits, not all 0."""
    return random.getrandbits(64) or 1
