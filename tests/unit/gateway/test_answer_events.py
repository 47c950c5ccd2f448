"""Events written from a template beside whole ones."""

from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from gateway.exchange import sse
from gateway.openai import ApiRequest
from gateway.openai_answer import Answer
from gateway.output import Delta
from protos.tandem.v1 import common_pb2 as pb

DELTAS = st.lists(
    st.builds(
        Delta,
        choice=st.integers(0, 1),
        token_ids=st.lists(st.integers(0, 9), max_size=2),
        text=st.text(max_size=4),
        finish_reason=st.sampled_from([None, None, pb.FINISH_REASON_STOP]),
    ),
    max_size=6,
)


def answers(**asked: Any) -> tuple[Answer, Answer]:
    request = ApiRequest(prompt=[1], sampling=pb.SamplingParams(), stream=True, **asked)
    ours, other = (Answer(request, "id", "model", None) for _ in range(2))  # type: ignore[arg-type]
    other._head = ours._head  # the second may have changed in between
    return ours, other


@given(DELTAS, st.sampled_from(["chat", "completion"]), st.booleans(), st.booleans())
def test_events_are_the_chunks(deltas: list[Delta], kind: str, usage: bool, ids: bool) -> None:
    ours, other = answers(kind=kind, include_usage=usage, return_token_ids=ids)
    for delta in deltas:
        chunk = other.chunk(replace(delta))
        assert ours.events(delta) == (b"" if chunk is None else sse(chunk))
