"""Answers of the OpenAI-compatible API: one body, or the chunks of a stream.

With `return_token_ids` the ids stand where vLLM puts them: `token_ids` in the choice, `prompt_token_ids` in
the choice of a completion and at the top of a chat answer, in a stream on the first chunk only.
"""

import secrets
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import orjson

from gateway.exchange import sse
from gateway.openai import ApiRequest
from gateway.output import Delta
from gateway.tokenizer import TextTokenizer
from protos.tandem.v1 import common_pb2 as pb

FINISH_REASONS = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_ABORT: "abort",
    pb.FINISH_REASON_ERROR: "error",
}

MARK = secrets.token_hex(16)
"""Stands for the text in the event that other events are made from; no client can know it."""

ID_PREFIX = {"completion": "cmpl-", "chat": "chatcmpl-"}


def usage_json(usage: pb.Usage) -> dict[str, Any]:
    """Token counts as OpenAI names them."""
    found: dict[str, Any] = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
    if usage.HasField("accepted_prediction_tokens"):
        found["completion_tokens_details"] = {
            "accepted_prediction_tokens": usage.accepted_prediction_tokens,
            "rejected_prediction_tokens": usage.rejected_prediction_tokens,
        }
    return found


class Answer:
    """Writes the answer to one request, in either shape."""

    def __init__(self, request: ApiRequest, request_id: str, model: str, tokenizer: TextTokenizer) -> None:
        self._request = request
        self._is_chat = request.kind == "chat"
        self._tokenizer = tokenizer
        self._head = {
            "id": ID_PREFIX[request.kind] + request_id,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": None,
        }
        self._started: set[int] = set()
        self._wants_tokens = request.return_token_ids or request.sampling.HasField("logprobs")
        self._text_events: dict[int, tuple[bytes, bytes]] = {}
        self._text_offsets: Counter[int] = Counter()

    def events(self, delta: Delta) -> bytes:
        """As server-sent events, perhaps none. Most differ in their text alone: only that is written anew."""
        is_text = delta.choice in self._started and delta.finish_reason is None and not self._wants_tokens
        if is_text and delta.text:
            before, behind = self._text_events.get(delta.choice) or self._text_event(delta.choice)
            return before + orjson.dumps(delta.text) + behind
        chunk = self.chunk(delta)
        events = b"" if chunk is None else sse(chunk)
        if delta.usage is not None and self._request.include_usage:
            events += sse(self.usage_chunk(delta.usage))
        return events

    def _text_event(self, choice: int) -> tuple[bytes, bytes]:
        """What stands before and behind the text in the events of a choice."""
        whole = self.chunk(Delta(choice=choice, text=MARK))
        assert whole is not None
        before, behind = sse(whole).split(orjson.dumps(MARK))
        self._text_events[choice] = before, behind
        return before, behind

    def chunk(self, delta: Delta) -> dict[str, Any] | None:
        """One chunk of a stream; None if there is nothing to say yet."""
        is_first = delta.choice not in self._started
        self._started.add(delta.choice)
        if not self._is_worth_sending(delta, is_first):
            return None
        choice = self._choice(delta)
        if self._is_chat:
            role = {"role": "assistant"} if is_first else {}
            choice["delta"] = role | {"content": delta.text}
        else:
            choice["text"] = delta.text
        chunk = self._body("chat.completion.chunk" if self._is_chat else "text_completion", [choice])
        if self._request.return_token_ids and delta.prompt_token_ids:
            (chunk if self._is_chat else choice)["prompt_token_ids"] = list(delta.prompt_token_ids)
        if self._request.include_usage:
            chunk["usage"] = None
        return chunk

    def usage_chunk(self, usage: pb.Usage) -> dict[str, Any]:
        """The chunk behind the last one, with `stream_options.include_usage`."""
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        return self._body(kind, []) | {"usage": usage_json(usage)}

    def whole(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        """The whole answer from the deltas of each choice joined into one."""
        choices = [self._whole_choice(delta) for delta in deltas]
        body = self._body("chat.completion" if self._is_chat else "text_completion", choices)
        if self._request.return_token_ids and self._is_chat:
            body["prompt_token_ids"] = list(deltas[0].prompt_token_ids)
        if self._request.sampling.HasField("prompt_logprobs") and self._is_chat:
            body["prompt_logprobs"] = self._prompt_logprobs(deltas[0])
        if (usage := deltas[-1].usage) is not None:
            body["usage"] = usage_json(usage)
        return body

    def _whole_choice(self, delta: Delta) -> dict[str, Any]:
        choice = self._choice(delta)
        if self._is_chat:
            return choice | {"message": {"role": "assistant", "content": delta.text, "refusal": None}}
        if self._request.return_token_ids:
            choice["prompt_token_ids"] = list(delta.prompt_token_ids)
        if self._request.sampling.HasField("prompt_logprobs"):
            choice["prompt_logprobs"] = self._prompt_logprobs(delta)
        return choice | {"text": delta.text}

    def _is_worth_sending(self, delta: Delta, is_first: bool) -> bool:
        return bool(delta.text) or is_first or delta.finish_reason is not None or self._wants_tokens

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._head | {"object": kind, "choices": choices}

    def _choice(self, delta: Delta) -> dict[str, Any]:
        reason = delta.finish_reason
        choice: dict[str, Any] = {
            "index": delta.choice,
            "logprobs": self._logprobs(delta),
            "finish_reason": FINISH_REASONS[reason] if reason is not None else None,
            "stop_reason": delta.stop_reason,
        }
        if self._request.return_token_ids:
            choice["token_ids"] = list(delta.token_ids)
        return choice

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        if not self._request.sampling.HasField("logprobs"):
            return None
        pairs = list(zip(delta.token_ids, delta.logprobs, strict=False))
        if self._is_chat:
            return {"content": [self._chat_logprob(*pair) for pair in pairs], "refusal": None}
        return self._completion_logprobs(delta.choice, pairs)

    def _chat_logprob(self, token_id: int, logprob: pb.TokenLogprob) -> dict[str, Any]:
        top = [self._spelled(item.token_id, item.logprob) for item in logprob.top]
        return self._spelled(token_id, logprob.logprob) | {"top_logprobs": top}

    def _spelled(self, token_id: int, logprob: float) -> dict[str, Any]:
        text, raw = self._tokenizer.token_text(token_id)
        return {"token": text, "logprob": _json_float(logprob), "bytes": list(raw)}

    def _prompt_logprobs(self, delta: Delta) -> list[dict[str, Any] | None]:
        """As vLLM writes them: nothing is known of the first token; ranks are those of the alternatives."""
        tokens = zip(delta.prompt_token_ids[1:], delta.prompt_logprobs, strict=True)
        return [None, *(self._prompt_logprob(*pair) for pair in tokens)]

    def _prompt_logprob(self, token_id: int, logprob: pb.TokenLogprob) -> dict[str, Any]:
        entries: dict[int, tuple[float, int | None]] = {token_id: (logprob.logprob, None)}
        entries |= {item.token_id: (item.logprob, rank) for rank, item in enumerate(logprob.top, 1)}
        return {
            str(each): {
                "logprob": _json_float(value),
                "rank": rank,
                "decoded_token": self._tokenizer.token_text(each)[0],
            }
            for each, (value, rank) in entries.items()
        }

    def _completion_logprobs(
        self, choice: int, pairs: Sequence[tuple[int, pb.TokenLogprob]]
    ) -> dict[str, Any]:
        tokens = [self._tokenizer.token_text(token_id)[0] for token_id, _ in pairs]
        offsets = []
        for token in tokens:
            offsets.append(self._text_offsets[choice])
            self._text_offsets[choice] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [_json_float(logprob.logprob) for _, logprob in pairs],
            "top_logprobs": [self._top(token_id, logprob) for token_id, logprob in pairs],
            "text_offset": offsets,
        }

    def _top(self, token_id: int, logprob: pb.TokenLogprob) -> dict[str, float]:
        """The likeliest tokens and the sampled one, by text."""
        top = {
            self._tokenizer.token_text(item.token_id)[0]: _json_float(item.logprob) for item in logprob.top
        }
        return {self._tokenizer.token_text(token_id)[0]: _json_float(logprob.logprob)} | top


def _json_float(value: float) -> float:
    """JSON has no minus infinity: OpenAI and vLLM write -9999."""
    return max(value, -9999.0)
