"""Stages of attempts from timestamps: spans, latencies and the hidden share of a transfer."""

import pytest

from engine.engine import StepResult
from engine.outputs import StepOutput
from engine.plan import Scheduled
from protos.tandem.v1 import common_pb2 as pb
from runtime.clock import ManualClock, unix_ns
from runtime.tracing import Span, Tracer
from tests.fakes.sink import ListSink
from worker.prefill_watch import Mark, PrefillWatch, enter
from worker.timeline import COMPUTE, GENERATE, QUEUE, RECEIVE, RESERVE, SEND, Stage, Timeline, Timelines

PARENT = "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01"


class Made:
    def __init__(self, tracer: Tracer | None = None) -> None:
        self.clock = ManualClock(100.0)
        self.sink = ListSink()
        self.stages: list[tuple[str, float]] = []
        self.timelines = Timelines(
            tracer or Tracer(self.sink), "decode", lambda *stage: self.stages.append(stage), self.clock
        )

    def open(self, attempt: int = 0) -> None:
        self.timelines.open("key", pb.Submit(attempt=attempt, transfer_id=bytes(16), traceparent=PARENT))


def test_stages_become_spans_below_the_attempt() -> None:
    made = Made()
    made.open()
    made.clock.advance(1)
    made.timelines.begin("key", RESERVE)  # the first stage begins with the attempt
    made.timelines.finish("key", RESERVE)
    made.timelines.begin("key", RECEIVE)
    made.clock.advance(2)
    made.timelines.finish("key", RECEIVE)
    made.timelines.begin("key", GENERATE)
    made.clock.advance(4)
    assert made.timelines.in_stages() == {GENERATE: 1}
    made.timelines.close("key", None, {"tandem.outcome": "finished"})
    *parts, request = made.sink.records
    assert [(part.name, part.start_ns - unix_ns(100), part.end_ns - unix_ns(100)) for part in parts] == [
        (RESERVE, 0, 10**9),
        (RECEIVE, 10**9, 3 * 10**9),
        (GENERATE, 3 * 10**9, 7 * 10**9),
    ]
    assert {part.parent for part in parts} == {request.context}
    assert request.parent is not None
    assert request.parent.traceparent == PARENT
    assert request.attributes["gen_ai.latency.time_in_model_decode"] == 4
    assert request.attributes["tandem.outcome"] == "finished"
    assert made.stages == [(RESERVE, 1), (RECEIVE, 2), (GENERATE, 4)]
    assert len(made.timelines) == 0


def test_an_error_ends_the_stage_that_it_hit() -> None:
    made = Made()
    made.open()
    made.timelines.begin("key", RESERVE)
    made.timelines.finish("key", RESERVE)
    made.timelines.begin("key", RECEIVE)
    made.timelines.close("key", "the link failed", {})
    reserve, receive, request = made.sink.records
    assert (reserve.error, receive.error, request.error) == (None, "the link failed", "the link failed")
    assert made.stages == [(RESERVE, 0)]


def test_what_is_said_of_an_ended_attempt_changes_nothing() -> None:
    made = Made()
    made.open()
    made.timelines.close("key", None, {})
    made.timelines.begin("key", SEND)
    assert made.timelines.finish("key", SEND) is None
    made.timelines.close("key", None, {})
    assert [record.name for record in made.sink.records] == ["decode.request"]


def test_a_new_attempt_links_to_the_one_before() -> None:
    made = Made()
    for attempt in (0, 1):
        made.open(attempt)
        made.timelines.close("key", None, {})
    first, second = made.sink.records
    assert first.links == []
    assert list(second.links) == [first.context]


def test_without_a_sink_stages_still_count() -> None:
    made = Made(Tracer())
    made.open()
    made.timelines.begin("key", RESERVE)
    made.clock.advance(3)
    made.timelines.close("key", None, {})
    assert made.stages == [(RESERVE, 3)]
    assert made.sink.records == []


@pytest.mark.parametrize(
    ("compute", "send", "hidden"),
    [((0, 4), (4, 6), 0.0), ((0, 4), (3, 5), 0.5), ((0, 9), (3, 5), 1.0), ((0, 4), (4, 4), None)],
)
def test_hidden_share_of_a_transfer(
    compute: tuple[float, float], send: tuple[float, float], hidden: float | None
) -> None:
    timeline = Timeline(Span(), 0.0, {}, {COMPUTE: Stage(*compute), SEND: Stage(*send)})
    assert timeline.hidden_fraction() == hidden


class FakeRequest:
    def __init__(self, key: str) -> None:
        self.key = key


def step(batch: str, outputs: str = "") -> StepResult:
    return StepResult(
        batch=[Scheduled(FakeRequest(key), 1) for key in batch],
        outputs=[StepOutput(request=FakeRequest(key), start_index=0) for key in outputs],
    )


def test_a_prompt_is_computed_from_its_first_chunk_to_its_first_token() -> None:
    watch = PrefillWatch()
    for key in "abc":
        watch.add(key)
    assert watch.on_step(step("x", "x"), 0, 1) == []
    assert watch.on_step(step("ab", "a"), 1, 2) == [Mark("b", 1, None), Mark("a", 1, 2)]
    watch.drop("c")
    assert watch.on_step(step("abc"), 2, 3) == []
    assert watch.on_step(step("ab", "ab"), 3, 4) == [Mark("b", 1, 4)]
    assert watch.on_step(step("ab", "ab"), 4, 5) == []


def test_a_worker_that_prefills_for_itself_generates_next() -> None:
    made = Made()
    made.open()
    made.timelines.begin("key", QUEUE)
    enter(made.timelines, [Mark("key", 101, None)], GENERATE)
    assert made.timelines.in_stages() == {COMPUTE: 1}
    enter(made.timelines, [Mark("key", 101, 103)], GENERATE)
    assert made.timelines.in_stages() == {GENERATE: 1}
    assert made.stages == [(QUEUE, 1), (COMPUTE, 2)]
