"""The KV link's messages between their plain form (kvtransfer.messages) and the wire."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any, cast

from engine.request import TokenLogprob
from kvtransfer import messages as m
from kvtransfer.layout import KvFacts, KvGroup
from protos.tandem.v1 import kvlink_pb2 as pb
from protos.tandem.v1.common_pb2 import FinishReason
from worker.convert import from_logprob, to_logprob

Message = m.SenderMessage | m.ReceiverMessage

FLAT: dict[type[Any], tuple[str, Callable[..., Any]]] = {
    m.Welcome: ("welcome", pb.Welcome),
    m.Rendezvous: ("rendezvous", pb.Rendezvous),
    m.Offer: ("offer", pb.Offer),
    m.Reserved: ("reserved", pb.Reserved),
    m.Rejected: ("rejected", pb.Rejected),
    m.FrameHeader: ("frame", pb.FrameHeader),
    m.Credit: ("credit", pb.Credit),
    m.CommitAck: ("commit_ack", pb.CommitAck),
    m.Cancel: ("cancel", pb.Cancel),
    m.Ping: ("ping", pb.LinkPing),
}
"""Messages whose fields are numbers, strings and bytes: their oneof field and wire type."""

BY_FIELD = {field: plain for plain, (field, _) in FLAT.items()}


def to_request(message: Message) -> pb.OpenRequest:
    """A sender's message as it travels."""
    if isinstance(message, m.Hello):
        return pb.OpenRequest(hello=_from_hello(message))
    if isinstance(message, m.Commit):
        return pb.OpenRequest(commit=_from_commit(message))
    field, wire = FLAT[type(message)]
    return pb.OpenRequest(**{field: wire(**_values(message))})


def to_response(message: Message) -> pb.OpenResponse:
    """A receiver's message as it travels."""
    field, wire = FLAT[type(message)]
    return pb.OpenResponse(**{field: wire(**_values(message))})


def from_wire(envelope: pb.OpenRequest | pb.OpenResponse) -> Message | None:
    """The plain message of an envelope; None for a kind that this version does not know."""
    field = envelope.WhichOneof("message")
    if field is None:
        return None
    body = getattr(envelope, field)
    if field == "hello":
        return _to_hello(body)
    if field == "commit":
        return _to_commit(body)
    plain = BY_FIELD[field]
    message: Message = plain(**{item.name: _plain(getattr(body, item.name)) for item in fields(plain)})
    return message


def _values(message: Any) -> dict[str, Any]:
    return {item.name: getattr(message, item.name) for item in fields(message)}


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | str | bytes) else tuple(value)


def _from_hello(hello: m.Hello) -> pb.Hello:
    return pb.Hello(**(_values(hello) | {"facts": _from_facts(hello.facts)}))


def _to_hello(hello: pb.Hello) -> m.Hello:
    values = {item.name: getattr(hello, item.name) for item in fields(m.Hello)}
    lists = {name: tuple(values[name]) for name in ("transports", "transport_proofs")}
    return m.Hello(**(values | lists | {"facts": _to_facts(hello.facts)}))


def _from_facts(facts: KvFacts) -> pb.KvFacts:
    groups = [pb.KvGroup(**_values(group)) for group in facts.groups]
    return pb.KvFacts(**(_values(facts) | {"groups": groups}))


def _to_facts(facts: pb.KvFacts) -> KvFacts:
    groups = tuple(
        KvGroup(**{item.name: getattr(group, item.name) for item in fields(KvGroup)})
        for group in facts.groups
    )
    values = {item.name: getattr(facts, item.name) for item in fields(KvFacts)}
    return KvFacts(**(values | {"groups": groups}))


def _from_commit(commit: m.Commit) -> pb.Commit:
    tokens = [_from_first_token(token) for token in commit.first_tokens]
    return pb.Commit(**(_values(commit) | {"first_tokens": tokens}))


def _from_first_token(token: m.FirstToken) -> pb.FirstToken:
    wire = pb.FirstToken(choice=token.choice, token_id=token.token_id)
    if token.logprob is not None:
        assert isinstance(token.logprob, TokenLogprob)
        wire.logprob.CopyFrom(from_logprob(token.logprob))
    if token.finish_reason is not None:
        wire.finish_reason = cast("FinishReason", token.finish_reason)
    return wire


def _to_commit(commit: pb.Commit) -> m.Commit:
    values = {item.name: getattr(commit, item.name) for item in fields(m.Commit)}
    return m.Commit(**(values | {"first_tokens": tuple(map(_to_first_token, commit.first_tokens))}))


def _to_first_token(token: pb.FirstToken) -> m.FirstToken:
    return m.FirstToken(
        choice=token.choice,
        token_id=token.token_id,
        logprob=to_logprob(token.logprob) if token.HasField("logprob") else None,
        finish_reason=token.finish_reason if token.HasField("finish_reason") else None,
    )
