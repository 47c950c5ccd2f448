"""What workers say about one request, until its reader takes it.

A client that reads slowly makes its request's reader slow, and frames wait here. Those of one choice that
follow one another are joined, so that what waits is the tokens themselves; a frame by itself would keep the
whole message in memory that it came in, with the tokens of everybody else.
"""

import asyncio
from typing import NamedTuple

from gateway.attempt import Source
from protos.tandem.v1 import common_pb2 as pb
from runtime.errors import TandemError


class Arrival(NamedTuple):
    """One thing that a worker said about an attempt, or the loss of the worker."""

    source: Source
    attempt: int
    what: pb.TokenFrame | pb.AttemptEnd | TandemError


class Inbox:
    """Arrivals of one request from all of its workers, for one reader."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()  # to ask for it costs a system call
        self._arrivals: list[Arrival] = []
        self._joined: dict[tuple[Source, int, int], pb.TokenFrame] = {}
        """Our own copies among the arrivals, by whom and what they are of: later tokens join these."""
        self._reader: asyncio.Future[None] | None = None
        """Done as soon as there is something; None while nobody waits."""
        self._interrupt: TandemError | None = None

    def put(self, arrival: Arrival) -> None:
        """Add an arrival; never blocks."""
        if self._arrivals and isinstance(arrival.what, pb.TokenFrame):
            self._put_behind(arrival, arrival.what)
        else:
            self._arrivals.append(arrival)
        self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _put_behind(self, arrival: Arrival, frame: pb.TokenFrame) -> None:
        """Tokens, while others wait."""
        key = arrival.source, arrival.attempt, frame.choice
        last = self._joined.get(key)
        if last is not None and last.start_index + len(last.token_ids) == frame.start_index:
            _join(last, frame)
            return
        own = pb.TokenFrame()
        own.CopyFrom(frame)
        self._joined[key] = own
        self._arrivals.append(arrival._replace(what=own))

    def interrupt(self, error: TandemError) -> None:
        """Make the next `get` raise this error."""
        self._interrupt = error
        self._wake()

    async def get(self) -> list[Arrival]:
        """Everything that has come since the last call, at least one arrival."""
        if not self._arrivals and self._interrupt is None:
            self._reader = self._loop.create_future()
            await self._reader
        if self._interrupt is not None:
            raise self._interrupt
        arrivals, self._arrivals = self._arrivals, []
        if self._joined:
            self._joined = {}
        return arrivals


def _join(before: pb.TokenFrame, frame: pb.TokenFrame) -> None:
    """Make `before` say both; the tokens of `frame` follow its own."""
    before.token_ids.extend(frame.token_ids)
    before.logprobs.extend(frame.logprobs)
    before.cached_tokens = max(before.cached_tokens, frame.cached_tokens)
    before.accepted_draft_tokens += frame.accepted_draft_tokens
    before.rejected_draft_tokens += frame.rejected_draft_tokens
