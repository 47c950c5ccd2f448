"""Every link message survives the wire."""

import pytest

from engine.request import TokenLogprob
from kvtransfer import messages as m
from kvtransfer.layout import KvFacts, KvGroup
from protos.tandem.v1 import common_pb2
from protos.tandem.v1 import kvlink_pb2 as pb
from worker.link_messages import from_wire, to_request, to_response

FACTS = KvFacts(
    protocol_major=1,
    model_hash="m",
    tokenizer_hash="t",
    block_size=16,
    max_model_len=2048,
    rope="{}",
    groups=(KvGroup(name="target", num_layers=6, num_kv_heads=4, head_dim=32, dtype="float32"),),
)
IDENTITY = common_pb2.WorkerIdentity(worker_id="p", boot_id="b", address="h:1")
TOKEN = m.FirstToken(choice=0, token_id=7, logprob=TokenLogprob(-0.5, ((7, -0.5), (8, -2.0))))
ID = bytes(range(16))

FROM_SENDER = [
    m.Hello(
        sender=IDENTITY, receiver_boot_id="r", stage=0, sender_rank=0, receiver_rank=0, facts=FACTS,
        transports=("shm", "gloo"), transport_proofs=(b"proof", b""), num_ranks=2,
    ),
    m.Rendezvous(blob=b"blob"),
    m.Offer(transfer_id=ID, num_tokens=5),
    m.FrameHeader(
        ticket=2**63, sequence=1, group=0, first_block=2, num_blocks=3, first_layer=0, num_layers=6,
        size_index=1, checksum=2**64 - 1,
    ),
    m.Commit(ticket=1, transfer_id=ID, num_frames=1, checksum=9, first_tokens=(TOKEN,), cached_tokens=16),
    m.Cancel(transfer_id=ID, reason="why"),
]  # fmt: skip
FROM_RECEIVER = [
    m.Welcome(epoch=3, transport="gloo", frame_sizes=(4096, 1024), num_slabs=4, num_ranks=4),
    m.Rendezvous(blob=b"blob"),
    m.Reserved(transfer_id=ID, ticket=1, num_cached_tokens=32),
    m.Rejected(transfer_id=ID, code=8, reason="full", retryable=True),
    m.Credit(slabs=2),
    m.CommitAck(transfer_id=ID),
    m.Cancel(transfer_id=ID, reason="why"),
]


@pytest.mark.parametrize("message", FROM_SENDER, ids=lambda message: type(message).__name__)
def test_sender_messages(message: object) -> None:
    wire = pb.OpenRequest.FromString(to_request(message).SerializeToString())
    assert from_wire(wire) == message


@pytest.mark.parametrize("message", FROM_RECEIVER, ids=lambda message: type(message).__name__)
def test_receiver_messages(message: object) -> None:
    wire = pb.OpenResponse.FromString(to_response(message).SerializeToString())
    assert from_wire(wire) == message


def test_an_unknown_message_is_none() -> None:
    assert from_wire(pb.OpenRequest()) is None
