"""What a user of the client sees, and its conversion from and to the wire."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict, cast

from protos.tandem.v1 import common_pb2, inference_pb2

FinishReason = Literal["stop", "length", "abort", "error"]

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""Text; token ids; or chat messages, each with `role` and `content`."""


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
    """What is new since the last delta of a choice."""

    request_id: str
    choice: int = 0
    """Index of the choice; there is one unless `n` asks for more."""
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprob, ...]
    finish_reason: FinishReason | None
    """Set on the last delta of the choice."""
    stop_reason: str | None
    """The stop string or token id that ended the choice."""
    usage: Usage | None
    """Set on the last delta of the stream."""
    prompt_logprobs: tuple[Logprob, ...] = ()
    """On the first delta, if asked for: of the prompt's tokens from the second one on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One of the texts that answer a prompt."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprob, ...]
    finish_reason: FinishReason
    stop_reason: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """A whole answer; `text` and its like are those of the first choice."""

    request_id: str
    model: str
    choices: tuple[Choice, ...]
    """As many as `n` asks for, the best first where they are ranked."""
    usage: Usage
    prompt_logprobs: tuple[Logprob, ...] = ()
    """If asked for: of the prompt's tokens from the second one on."""

    @property
    def text(self) -> str:
        """The answer."""
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Its tokens."""
        return self.choices[0].token_ids

    @property
    def logprobs(self) -> tuple[Logprob, ...]:
        """One per token, if asked for."""
        return self.choices[0].logprobs

    @property
    def finish_reason(self) -> FinishReason:
        """Why it ended."""
        return self.choices[0].finish_reason

    @property
    def stop_reason(self) -> str | None:
        """The stop string or token id that ended it."""
        return self.choices[0].stop_reason


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


def delta(message: inference_pb2.GenerateResponse) -> Delta:
    """One message of a stream."""
    return Delta(
        request_id=message.request_id,
        choice=message.choice,
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=_logprobs(message.logprobs),
        prompt_logprobs=_logprobs(message.prompt_logprobs),
        finish_reason=_finish_reason(message.finish_reason) if message.HasField("finish_reason") else None,
        stop_reason=message.stop_reason if message.HasField("stop_reason") else None,
        usage=_usage(message.usage) if message.HasField("usage") else None,
    )


def completion(message: inference_pb2.CompleteResponse) -> Completion:
    """The answer of Complete."""
    return Completion(
        request_id=message.request_id,
        model=message.model,
        choices=tuple(_choice(each) for each in message.completions),
        usage=_usage(message.usage),
        prompt_logprobs=_logprobs(message.prompt_logprobs),
    )


def _choice(message: inference_pb2.Completion) -> Choice:
    return Choice(
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=_logprobs(message.logprobs),
        finish_reason=_finish_reason(message.finish_reason),
        stop_reason=message.stop_reason if message.HasField("stop_reason") else None,
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
