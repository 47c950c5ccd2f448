"""What a user of the client sees, and its conversion from and to the wire."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict, cast

from protos.tandem.v1 import common_pb2, inference_pb2

FinishReason = Literal["stop", "length", "abort", "error"]

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""Text; token ids; or chat messages, each with `role` and `content`."""


class Sampling(TypedDict, total=False):
    """Fields of SamplingParams; what is left out takes the server's default for the model."""

    max_tokens: int
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    include_stop_str_in_output: bool
    logit_bias: Mapping[int, float]
    logprobs: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Token counts of a whole request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    """Of the prompt tokens: found in a prefix cache."""
    accepted_prediction_tokens: int = 0
    """Draft tokens of speculative decoding that became output."""
    rejected_prediction_tokens: int = 0
    """Draft tokens that did not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Logprob:
    """Log-probability of one sampled token."""

    logprob: float
    top: tuple[tuple[int, float], ...]
    """(token id, logprob) of the likeliest alternatives."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Delta:
    """What is new since the last delta of a stream."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprob, ...]
    finish_reason: FinishReason | None
    """Set on the last delta."""
    stop_reason: str | None
    """The stop string or token id that ended the stream."""
    usage: Usage | None
    """Set on the last delta."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """A whole answer."""

    request_id: str
    model: str
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprob, ...]
    finish_reason: FinishReason
    stop_reason: str | None
    usage: Usage


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A served model."""

    id: str
    root: str
    """Directory of the checkpoint on the server."""
    max_model_len: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Worker:
    """A worker as the gateway sees it."""

    id: str
    role: str
    state: str
    address: str
    requests_running: int
    requests_waiting: int
    queued_prefill_tokens: int
    blocks_used: int
    blocks_cached: int
    blocks_total: int
    transfers: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerInfo:
    """The gateway and its workers."""

    version: str
    model: str
    max_model_len: int
    requests: int
    workers: tuple[Worker, ...]


class PromptFields(TypedDict, total=False):
    """The oneof of the request messages."""

    text: str
    token_ids: inference_pb2.TokenIds
    messages: inference_pb2.ChatMessages


def prompt_fields(prompt: Prompt) -> PromptFields:
    """The prompt as keywords of GenerateRequest, CompleteRequest or TokenizeRequest."""
    if isinstance(prompt, str):
        return {"text": prompt}
    if prompt and isinstance(prompt[0], Mapping):
        messages = [inference_pb2.ChatMessage(**message) for message in cast("list[dict[str, str]]", prompt)]
        return {"messages": inference_pb2.ChatMessages(messages=messages)}
    return {"token_ids": inference_pb2.TokenIds(ids=cast("Sequence[int]", prompt))}


def sampling_params(sampling: Sampling) -> common_pb2.SamplingParams:
    """The wire's form; TypeError for a name that it does not know, ValueError for a value of a wrong type."""
    fields = dict(sampling)
    unknown = fields.keys() - Sampling.__annotations__.keys()
    if unknown:
        raise TypeError(f"unknown sampling parameter: {', '.join(sorted(unknown))}")
    if isinstance(fields.get("stop"), str):
        fields["stop"] = [fields["stop"]]
    return common_pb2.SamplingParams(**{k: v for k, v in fields.items() if v is not None})  # type: ignore[arg-type]


def delta(message: inference_pb2.GenerateResponse) -> Delta:
    """One message of a stream."""
    return Delta(
        request_id=message.request_id,
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=_logprobs(message.logprobs),
        finish_reason=_finish_reason(message.finish_reason) if message.HasField("finish_reason") else None,
        stop_reason=message.stop_reason if message.HasField("stop_reason") else None,
        usage=_usage(message.usage) if message.HasField("usage") else None,
    )


def completion(message: inference_pb2.CompleteResponse) -> Completion:
    """The answer of Complete, which has one choice."""
    choice = message.completions[0]
    return Completion(
        request_id=message.request_id,
        model=message.model,
        text=choice.text,
        token_ids=tuple(choice.token_ids),
        logprobs=_logprobs(choice.logprobs),
        finish_reason=_finish_reason(choice.finish_reason),
        stop_reason=choice.stop_reason if choice.HasField("stop_reason") else None,
        usage=_usage(message.usage),
    )


def server_info(message: inference_pb2.GetServerInfoResponse) -> ServerInfo:
    """The answer of GetServerInfo."""
    return ServerInfo(
        version=message.version,
        model=message.model,
        max_model_len=message.max_model_len,
        requests=message.requests,
        workers=tuple(_worker(worker) for worker in message.workers),
    )


def _worker(message: inference_pb2.WorkerStatus) -> Worker:
    return Worker(
        id=message.identity.worker_id,
        role=_name(common_pb2.WorkerRole.Name(message.role), "WORKER_ROLE_"),
        state=_name(common_pb2.WorkerState.Name(message.state), "WORKER_STATE_"),
        address=message.identity.address,
        requests_running=message.load.requests_running,
        requests_waiting=message.load.requests_waiting,
        queued_prefill_tokens=message.load.queued_prefill_tokens,
        blocks_used=message.load.blocks_used,
        blocks_cached=message.load.blocks_cached,
        blocks_total=message.load.blocks_total,
        transfers=message.load.transfers,
    )


def _logprobs(messages: Sequence[common_pb2.TokenLogprob]) -> tuple[Logprob, ...]:
    return tuple(
        Logprob(logprob=m.logprob, top=tuple((top.token_id, top.logprob) for top in m.top)) for m in messages
    )


def _usage(message: common_pb2.Usage) -> Usage:
    return Usage(
        prompt_tokens=message.prompt_tokens,
        completion_tokens=message.completion_tokens,
        cached_tokens=message.cached_tokens,
        accepted_prediction_tokens=message.accepted_prediction_tokens,
        rejected_prediction_tokens=message.rejected_prediction_tokens,
    )


def _finish_reason(value: common_pb2.FinishReason) -> FinishReason:
    return cast("FinishReason", _name(common_pb2.FinishReason.Name(value), "FINISH_REASON_"))


def _name(enum_name: str, prefix: str) -> str:
    return enum_name.removeprefix(prefix).lower()
