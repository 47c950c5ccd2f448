from dataclasses import replace

import pytest

from kvtransfer import handshake
from kvtransfer.errors import LinkViolation
from kvtransfer.layout import KvFacts, KvGroup, block_bytes, layer_block_bytes, num_blocks_of
from kvtransfer.messages import Hello, Welcome
from runtime.errors import Mismatch

GROUP = KvGroup(name="target", num_layers=3, num_kv_heads=2, head_dim=8, dtype="float32")
FACTS = KvFacts(
    protocol_major=1,
    model_hash="m",
    tokenizer_hash="t",
    block_size=16,
    max_model_len=64,
    rope="{}",
    groups=(GROUP,),
)
HELLO = Hello(
    sender="p0",
    receiver_boot_id="boot",
    stage=0,
    sender_rank=0,
    receiver_rank=0,
    facts=FACTS,
    transports=("nccl", "gloo"),
)
CHOICES = {
    "facts": FACTS,
    "boot_id": "boot",
    "refusal": lambda name, proof: None if name == "gloo" else f"no {name} here, {proof!r}",
    "slab_bytes": {"gloo": 8192}.__getitem__,
    "num_slabs": 4,
    "epoch": 7,
}


def test_bytes_of_a_block():
    assert layer_block_bytes(GROUP, 16) == 2 * 16 * 2 * 8 * 4
    assert block_bytes(GROUP, 16) == 3 * 2 * 16 * 2 * 8 * 4
    assert [num_blocks_of(n, 16) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]


def test_differences_name_every_field_with_both_values():
    other = replace(
        FACTS, block_size=32, rope='{"theta": 1}', groups=(replace(GROUP, dtype="bfloat16", head_dim=4),)
    )
    assert FACTS.differences(FACTS) == []
    assert FACTS.differences(other) == [
        "block_size: 16 != 32",
        'rope: {} != {"theta": 1}',
        "groups[0].head_dim: 8 != 4",
        "groups[0].dtype: float32 != bfloat16",
    ]
    assert FACTS.differences(replace(FACTS, groups=())) == ["groups: 1 != 0"]


def test_leading_groups_that_both_sides_have_travel():
    draft = replace(GROUP, name="draft-1", num_layers=1)
    both, other = (
        replace(FACTS, groups=(GROUP, draft)),
        replace(FACTS, groups=(GROUP, replace(draft, name="x"))),
    )
    for ours, theirs, num_groups in ((both, both, 2), (both, FACTS, 1), (FACTS, both, 1), (both, other, 1)):
        welcome = handshake.answer(replace(HELLO, facts=theirs), **{**CHOICES, "facts": ours})
        assert welcome.num_groups == num_groups
        handshake.require_usable(welcome, replace(HELLO, facts=theirs), max_slab_bytes=8192)
        assert ours.with_groups(num_groups) == theirs.with_groups(num_groups)


def test_an_answer_takes_the_senders_first_common_transport():
    welcome = handshake.answer(HELLO, **CHOICES)
    assert welcome == Welcome(epoch=7, transport="gloo", frame_sizes=(8192, 2048, 512, 128), num_slabs=4)
    handshake.require_usable(welcome, HELLO, max_slab_bytes=8192)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"receiver_boot_id": "other"}, "other"),
        ({"transports": ("nccl",)}, "nccl: no nccl here, b''"),
        ({"transports": ("shm", "nccl"), "transport_proofs": (b"x",)}, "shm: no shm here, b'x'; nccl: no"),
        (
            {"facts": replace(FACTS, model_hash="x", max_model_len=1)},
            "model_hash: m != x; max_model_len: 64 != 1",
        ),
    ],
)
def test_a_mismatch_names_what_differs(change, named):
    with pytest.raises(Mismatch, match=named):
        handshake.answer(replace(HELLO, **change), **CHOICES)


@pytest.mark.parametrize(
    "change",
    [
        {"transport": "tcp"},
        {"frame_sizes": ()},
        {"frame_sizes": (8192, 8192)},
        {"frame_sizes": (2048, 8192)},
        {"frame_sizes": (8192, 0)},
        {"frame_sizes": (1 << 40,)},
        {"frame_sizes": (1024,)},
        {"frame_sizes": tuple(range(8192, 8192 - 17, -1))},
        {"num_slabs": 0},
        {"num_slabs": 1 << 31},
        {"num_groups": 0},
        {"num_groups": 2},
    ],
)
def test_a_sender_refuses_an_absurd_welcome(change):
    welcome = handshake.answer(HELLO, **CHOICES)
    with pytest.raises(LinkViolation):
        handshake.require_usable(replace(welcome, **change), HELLO, max_slab_bytes=8192)


def test_a_version_without_ranks_gets_whole_frames_or_a_refusal():
    """Its numbers are 0: frames from and to it are those of one rank."""
    alone = handshake.answer(replace(HELLO, num_ranks=0), **CHOICES)
    assert alone.num_ranks == 1
    handshake.require_usable(replace(alone, num_ranks=0), HELLO, max_slab_bytes=8192)
    several = handshake.answer(replace(HELLO, num_ranks=4), **CHOICES, num_ranks=2)
    assert several.num_ranks == 2
    handshake.require_usable(several, replace(HELLO, num_ranks=4), max_slab_bytes=8192)
    reason = "this worker has 2 ranks, and the other's version knows nothing of ranks"
    with pytest.raises(Mismatch, match=reason):
        handshake.answer(replace(HELLO, num_ranks=0), **CHOICES, num_ranks=2)
    unknown = replace(alone, num_ranks=0)
    with pytest.raises(Mismatch, match=reason):
        handshake.require_usable(unknown, replace(HELLO, num_ranks=2), max_slab_bytes=8192)
