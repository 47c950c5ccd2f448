"""When each attempt on this worker was in which stage: one record for its spans and for the metrics.

1. `open` at Submit, `close` at the attempt's end, however it ends; between them roles `begin` and `finish`
   stages by name. One that is open at the close shares the attempt's end.
2. A stage happens once: its second begin changes nothing, nor does what is said of an ended attempt.
3. The spans are made at the close; where nothing is traced that costs two dictionary entries per stage.

Everything here belongs to the event loop; the engine thread hands its times over with the results.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field

from protos.tandem.v1 import common_pb2 as pb
from runtime.clock import Clock, SystemClock
from runtime.tracing import NO_ATTRIBUTES, Attributes, AttributeValue, Span, Tracer

QUEUE, COMPUTE, SEND = "prefill.queue", "prefill.compute", "kv.send"
RESERVE, RECEIVE, GENERATE = "decode.reserve", "kv.receive", "decode.generate"

STAGES = {"prefill": (QUEUE, COMPUTE, SEND), "decode": (RESERVE, RECEIVE, QUEUE, COMPUTE, GENERATE)}
"""By role: those that an attempt may pass there. A decode worker may compute a prompt by itself."""

LATENCIES = {
    QUEUE: "gen_ai.latency.time_in_queue",
    COMPUTE: "gen_ai.latency.time_in_model_prefill",
    GENERATE: "gen_ai.latency.time_in_model_decode",
}
"""Stages whose length is an attribute that vLLM and SGLang have too."""


@dataclass(slots=True)
class Stage:
    """One stretch of an attempt's time; SystemClock seconds."""

    start_s: float
    end_s: float | None = None
    attributes: dict[str, AttributeValue] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Length of a finished stage."""
        assert self.end_s is not None
        return self.end_s - self.start_s

    def overlap_s(self, other: "Stage") -> float:
        """Seconds that both finished stages share."""
        assert self.end_s is not None
        assert other.end_s is not None
        return max(min(self.end_s, other.end_s) - max(self.start_s, other.start_s), 0.0)


@dataclass(slots=True, eq=False)
class Timeline:
    """The stages of one attempt, in the order in which they began."""

    span: Span
    start_s: float
    attributes: dict[str, AttributeValue]
    stages: dict[str, Stage] = field(default_factory=dict)

    def hidden_fraction(self) -> float | None:
        """Share of the transfer's time in which the prompt was still being computed; None without both."""
        send, compute = self.stages.get(SEND), self.stages.get(COMPUTE)
        if send is None or compute is None or send.end_s is None or compute.end_s is None:
            return None
        return send.overlap_s(compute) / send.seconds if send.seconds > 0 else None


class Timelines:
    """Those of all live attempts of a worker of one role."""

    def __init__(
        self,
        tracer: Tracer,
        role: str,
        on_stage: Callable[[str, float], None],
        clock: Clock | None = None,
    ) -> None:
        self._tracer = tracer
        self._name = f"{role}.request"
        self._on_stage = on_stage
        self._clock = clock or SystemClock()
        self._live: dict[Hashable, Timeline] = {}

    def __len__(self) -> int:
        return len(self._live)

    def in_stages(self) -> Mapping[str, int]:
        """How many live attempts are in each stage now."""
        open_stages = (
            name
            for timeline in self._live.values()
            for name, stage in timeline.stages.items()
            if stage.end_s is None
        )
        return Counter(open_stages)

    def open(self, key: Hashable, submit: pb.Submit) -> None:
        """An attempt begins."""
        now_s = self._clock.now()
        span = self._tracer.span(self._name, now_s, submit.traceparent, submit.attempt)
        facts: dict[str, AttributeValue] = {"gen_ai.request.id": submit.request_id}
        facts["gen_ai.usage.input_tokens"] = len(submit.prompt_token_ids)
        facts |= {"tandem.attempt": submit.attempt, "tandem.transfer.id": submit.transfer_id.hex()}
        if submit.HasField("peer"):
            facts["tandem.peer.worker"] = submit.peer.worker_id
        self._live[key] = Timeline(span, now_s, facts)

    def begin(self, key: Hashable, stage: str, at_s: float | None = None) -> None:
        """A stage begins, now unless `at_s` says otherwise; one that has begun goes on.

        The first one begins with the attempt, so that its time has no gap.
        """
        timeline = self._live.get(key)
        if timeline is None or stage in timeline.stages:
            return
        if not timeline.stages:
            at_s = timeline.start_s
        timeline.stages[stage] = Stage(self._clock.now() if at_s is None else at_s)

    def finish(
        self, key: Hashable, stage: str, at_s: float | None = None, attributes: Attributes = NO_ATTRIBUTES
    ) -> Timeline | None:
        """A stage ends; returns the attempt's timeline if it is live and the stage was open."""
        timeline = self._live.get(key)
        found = timeline.stages.get(stage) if timeline is not None else None
        if found is None or found.end_s is not None:
            return None
        found.end_s = self._clock.now() if at_s is None else at_s
        found.attributes.update(attributes)
        self._on_stage(stage, found.seconds)
        return timeline

    def close(self, key: Hashable, error: str | None, attributes: Attributes) -> None:
        """An attempt ended, with an error or without; its spans are recorded."""
        now_s = self._clock.now()
        if error is None:
            self._finish_all(key, now_s)
        timeline = self._live.pop(key, None)
        if timeline is None or not timeline.span.recording:
            return
        timeline.attributes.update(attributes)
        for name, stage in timeline.stages.items():
            _record(timeline, name, stage, now_s, error)
        timeline.span.end(now_s, timeline.attributes, error=error)

    def _finish_all(self, key: Hashable, now_s: float) -> None:
        timeline = self._live.get(key)
        for stage in timeline.stages if timeline is not None else ():
            self.finish(key, stage, now_s)


def _record(timeline: Timeline, name: str, stage: Stage, now_s: float, error: str | None) -> None:
    """The span of a stage; one that was cut off ends with the attempt and shares its error."""
    if stage.end_s is None:
        timeline.span.child(name, stage.start_s, now_s, stage.attributes, error=error)
        return
    if name in LATENCIES:
        timeline.attributes[LATENCIES[name]] = stage.seconds
    timeline.span.child(name, stage.start_s, stage.end_s, stage.attributes)
