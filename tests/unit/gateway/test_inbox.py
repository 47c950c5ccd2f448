"""Frames that wait for a slow reader, beside frames that are read one by one."""

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from gateway.attempt import Progress, Source
from gateway.inbox import Arrival, Inbox
from protos.tandem.v1 import common_pb2 as pb

NUM_CHOICES = 2

WORDS = st.tuples(
    st.sampled_from(Source),
    st.integers(0, 1),
    st.integers(0, NUM_CHOICES - 1),
    st.integers(0, 3),
    st.integers(1, 3),
)
"""(source, attempt, choice, how many tokens it repeats, how many are in it)"""


def token_at(choice: int, index: int) -> int:
    return 100 * choice + index


class Workers:
    """Both workers' frames: each goes on where it has stopped, or repeats some."""

    def __init__(self) -> None:
        self._next: dict[tuple[Source, int, int], int] = {}

    def say(self, source: Source, attempt: int, choice: int, repeated: int, num_tokens: int) -> Arrival:
        key = source, attempt, choice
        start = max(self._next.get(key, 0) - repeated, 0)
        self._next[key] = start + num_tokens
        indices = range(start, start + num_tokens)
        frame = pb.TokenFrame(
            attempt=attempt,
            choice=choice,
            start_index=start,
            token_ids=[token_at(choice, index) for index in indices],
            logprobs=[pb.TokenLogprob(logprob=-index) for index in indices],
            accepted_draft_tokens=1,
        )
        return Arrival(source, attempt, frame)


def outcome(arrivals: list[Arrival]) -> tuple[list[list[int]], list[list[float]], int]:
    """Tokens and logprobs of each choice, and accepted drafts."""
    progress = Progress(NUM_CHOICES)
    progress.begin(split=True)
    logprobs: list[list[float]] = [[] for _ in range(NUM_CHOICES)]
    for source, _, what in arrivals:
        assert isinstance(what, pb.TokenFrame)
        logprobs[what.choice] += [each.logprob for each in progress.on_frame(source, what).logprobs]
    return [choice.emitted for choice in progress.choices], logprobs, progress.draft_tokens.accepted


async def read_late(said: list[Arrival]) -> list[Arrival]:
    inbox = Inbox()
    for arrival in said:
        inbox.put(arrival)
    return await inbox.get()


@given(st.lists(WORDS, min_size=1, max_size=12))
def test_joined_frames_say_the_same(words: list[tuple[Source, int, int, int, int]]) -> None:
    workers = Workers()
    said = [workers.say(*word) for word in words]
    got = asyncio.run(read_late(said))
    assert outcome(got) == outcome(said)
    assert got[0] is said[0]


async def test_what_waits_does_not_grow_by_the_frame() -> None:
    inbox, workers = Inbox(), Workers()
    for _ in range(1_000):
        inbox.put(workers.say(Source.DECODE, 0, 0, 0, 1))
    first, joined = await inbox.get()
    assert isinstance(first.what, pb.TokenFrame)
    assert isinstance(joined.what, pb.TokenFrame)
    assert [*first.what.token_ids, *joined.what.token_ids] == [token_at(0, index) for index in range(1_000)]
    inbox.put(workers.say(Source.DECODE, 0, 0, 0, 1))
    assert len(await inbox.get()) == 1
