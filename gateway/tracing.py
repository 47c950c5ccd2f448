"""One request as the gateway sees it: the span `gateway.request` and its parts.

`flow` and `run` say what happens and when; the spans are recorded at the request's end. Names and attributes
are those of DESIGN's span tree and of the GenAI, RPC and HTTP conventions; `gen_ai.latency.*` is what vLLM
and SGLang share. No text of a client is recorded unless CAPTURE_VARIABLE asks for it.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from gateway.attempt import Failed
from gateway.output import Delta
from gateway.router import Route
from protos.tandem.v1 import common_pb2 as pb
from runtime.clock import Clock, SystemClock
from runtime.errors import Cancelled, Internal, TandemError
from runtime.tracing import AttributeValue, Span

CAPTURE_VARIABLE = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"

PROVIDER = "tandem"

FAULTS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})
"""Statuses that make a server's span an error; the others are the client's doing."""

FINISH_REASONS = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_ABORT: "abort",
    pb.FINISH_REASON_ERROR: "error",
}

REQUEST_ATTRIBUTES = {
    "max_tokens": "gen_ai.request.max_tokens",
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "top_k": "gen_ai.request.top_k",
    "n": "gen_ai.request.choice.count",
    "seed": "gen_ai.request.seed",
    "frequency_penalty": "gen_ai.request.frequency_penalty",
    "presence_penalty": "gen_ai.request.presence_penalty",
}
"""From fields of SamplingParams that the client set."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """How a request came in."""

    operation: str = "text_completion"
    """gen_ai.operation.name: `chat` or `text_completion`."""
    method: str = ""
    """Full name of the gRPC method, or the HTTP route."""
    is_http: bool = False
    stream: bool = False
    """The client wants deltas."""
    traceparent: str = ""
    """W3C trace context of the client; may be empty."""


def captures_content() -> bool:
    """Whether prompts and answers are to be recorded."""
    return os.environ.get(CAPTURE_VARIABLE, "").strip().lower() == "true"


@dataclass(eq=False, kw_only=True)
class RequestTrace:
    """The story of one request; belongs to the event loop."""

    span: Span
    origin: Origin
    arrived_s: float
    request_id: str
    model: str
    first_token_s: float | None = None
    submitted_s: float | None = None
    """Of the first attempt."""
    usage: pb.Usage | None = None
    _finish_reasons: list[str] = field(default_factory=list)
    _clock: Clock = field(default_factory=SystemClock)
    _attributes: dict[str, AttributeValue] = field(default_factory=dict)
    _content: list[str] | None = None

    @property
    def traceparent(self) -> str:
        """What workers get."""
        return self.span.traceparent

    @property
    def exemplar(self) -> dict[str, str] | None:
        """Labels that lead from a histogram to this trace."""
        trace_id = self.span.trace_id
        return None if trace_id is None else {"trace_id": trace_id}

    def tokenized(self, start_s: float, prompt: object, num_tokens: int) -> None:
        """The prompt is token ids."""
        self.span.child(
            "gateway.tokenize", start_s, self._clock.now(), {"gen_ai.usage.input_tokens": num_tokens}
        )
        if self.span.recording and captures_content():
            self._attributes["gen_ai.input.messages"] = _messages(prompt)
            self._content = []

    def asked(self, sampling: pb.SamplingParams) -> None:
        """The request is valid."""
        if self.span.recording:
            given = {name.name for name, _ in sampling.ListFields()}
            self._attributes |= {
                attribute: getattr(sampling, name)
                for name, attribute in REQUEST_ATTRIBUTES.items()
                if name in given
            }

    def admitted(self, start_s: float, end_s: float) -> None:
        """The wait for a slot is over."""
        self.span.child("gateway.admit", start_s, end_s)

    def routed(self, start_s: float, attempt: int, route: Route) -> None:
        """An attempt has workers and was sent to them."""
        now_s = self._clock.now()
        if attempt == 0:
            self.submitted_s = now_s
        attributes: dict[str, AttributeValue] = {
            "tandem.attempt": attempt,
            "tandem.decode.worker": route.decode,
            "tandem.prefill.worker": route.prefill or route.decode,
        }
        self.span.child("gateway.route", start_s, now_s, attributes)

    def attempt_failed(self, attempt: int, failed: Failed, worker: str | None, num_emitted: int) -> None:
        """An attempt is over without a result; another one goes on behind `num_emitted` tokens."""
        self.span.event(
            "migration" if num_emitted else "retry",
            self._clock.now(),
            {
                "tandem.attempt": attempt,
                "tandem.worker": worker or "",
                "tandem.worker.role": failed.source.value,
                "tandem.worker.lost": failed.worker_lost,
                "tandem.emitted_tokens": num_emitted,
                "error.type": failed.error.reason,
                "error.message": failed.error.message,
            },
        )

    def on_delta(self, now_s: float, delta: Delta) -> None:
        """Output for the client."""
        if self.first_token_s is None and delta.token_ids:
            self.first_token_s = now_s
            self.span.event("first_token", now_s)
        if delta.finish_reason is not None:
            self._finish_reasons.append(FINISH_REASONS.get(delta.finish_reason, "error"))
        if delta.usage is not None:
            self.usage = delta.usage
        if self._content is not None:
            self._content.append(delta.text)

    def end(self, end_s: float, fault: TandemError | None) -> None:
        """The request is over, however it ended."""
        if not self.span.recording:
            return
        failed = fault is not None and fault.code in FAULTS
        attributes = self._attributes | self._facts() | self._latencies(end_s) | self._status(fault)
        self.span.end(end_s, attributes, error=fault.message if fault and failed else None)

    def _facts(self) -> dict[str, AttributeValue]:
        facts: dict[str, AttributeValue] = {
            "gen_ai.operation.name": self.origin.operation,
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.request.model": self.model,
            "gen_ai.response.model": self.model,
            "gen_ai.response.id": self.request_id,
            "gen_ai.request.id": self.request_id,
            "gen_ai.request.stream": self.origin.stream,
        }
        if self._finish_reasons:
            facts["gen_ai.response.finish_reasons"] = tuple(self._finish_reasons)
        if self.usage is not None:
            facts["gen_ai.usage.input_tokens"] = self.usage.prompt_tokens
            facts["gen_ai.usage.output_tokens"] = self.usage.completion_tokens
            facts["gen_ai.usage.cache_read.input_tokens"] = self.usage.cached_tokens
        if self._content is not None:
            facts["gen_ai.output.messages"] = _message_json("assistant", "".join(self._content))
        return facts

    def _latencies(self, end_s: float) -> dict[str, AttributeValue]:
        latencies: dict[str, AttributeValue] = {"gen_ai.latency.e2e": end_s - self.arrived_s}
        if self.submitted_s is not None:
            latencies["gen_ai.latency.time_in_queue"] = self.submitted_s - self.arrived_s
        if self.first_token_s is not None:
            latencies["gen_ai.latency.time_to_first_token"] = self.first_token_s - self.arrived_s
        return latencies

    def _status(self, fault: TandemError | None) -> dict[str, AttributeValue]:
        status: dict[str, AttributeValue] = {} if fault is None else {"error.type": fault.reason}
        if self.origin.is_http:
            code = 200 if fault is None else fault.http_status
            status |= {"http.request.method": "POST", "http.route": self.origin.method}
            return status | {"http.response.status_code": code}
        status |= {"rpc.system.name": "grpc", "rpc.method": self.origin.method}
        return status | {"rpc.response.status_code": "OK" if fault is None else fault.code}


def as_tandem_error(error: BaseException | None) -> TandemError | None:
    """What the client was, or would have been, told."""
    if error is None or isinstance(error, TandemError):
        return error
    if isinstance(error, Exception):
        return Internal("internal error")
    return Cancelled("the client went away")


def _messages(prompt: object) -> str:
    """A prompt in the GenAI conventions' form of messages; token ids have no text to show."""
    if isinstance(prompt, str):
        return _message_json("user", prompt)
    if not isinstance(prompt, tuple):
        return "[]"
    return orjson.dumps([_message(str(item["role"]), item["content"]) for item in prompt]).decode()


def _message_json(role: str, content: str) -> str:
    return orjson.dumps([_message(role, content)]).decode()


def _message(role: str, content: Any) -> Mapping[str, Any]:
    return {"role": role, "parts": [{"type": "text", "content": content}]}
