"""The last token against a client that leaves, an Abort or a deadline: one outcome, whichever was first."""

import asyncio
import random
from collections import Counter

from gateway.flow import Generation
from gateway.output import Delta
from gateway.tracing import Origin
from protos.tandem.v1 import common_pb2 as pb
from tests.fakes.cluster import Cluster, cluster
from tests.fakes.worker import tokens_of

PROMPT = [300, 301, 302, 303]
NUM_TOKENS = 2
NUM_TRIES = 240
OUTCOMES = ("ok", "cancelled", "deadline")


def asked(number: int) -> Generation:
    return Generation(
        request_id=str(number),
        prompt=PROMPT,
        sampling=pb.SamplingParams(max_tokens=NUM_TOKENS, temperature=0),
        timeout_s=10.0,
        origin=Origin(operation="text_completion", method="/", stream=True, traceparent=""),
    )


async def consume(made: Cluster, generation: Generation, deltas: list[Delta]) -> None:
    async for delta in made.gateway.flow.stream(generation):
        deltas.append(delta)  # noqa: PERF401 - what came before a cancellation counts


def counts(made: Cluster) -> Counter[str]:
    """Requests by outcome, as /metrics has them."""
    requests = made.gateway.metrics.requests
    return Counter({name: int(requests.labels(name)._value.get()) for name in OUTCOMES})


def expect_one_end(deltas: list[Delta], outcome: str) -> None:
    """What was yielded is a prefix of the tokens; if it ended well it is whole, with one usage."""
    tokens = [token for delta in deltas for token in delta.token_ids]
    assert tokens == tokens_of(PROMPT, NUM_TOKENS)[: len(tokens)]
    ends = [delta for delta in deltas if delta.finish_reason is not None]
    usages = [delta.usage for delta in deltas if delta.usage is not None]
    assert len(ends) == len(usages) <= 1
    if outcome == "ok":
        assert ends[0].finish_reason == pb.FINISH_REASON_LENGTH
        assert (len(tokens), usages[0].completion_tokens) == (NUM_TOKENS, NUM_TOKENS)


def interrupt(made: Cluster, task: asyncio.Task[None], kind: str, request_id: str) -> None:
    """What ends a request from outside; its time is over when its timer says so."""
    if kind == "leave":
        task.cancel()
    elif kind == "abort":
        made.gateway.flow.abort([request_id])
    else:
        live = made.gateway.flow._live.get(("", request_id))
        if live is not None and live.run is not None:
            live.run._expire()


async def test_each_end_of_a_request_around_its_last_token() -> None:
    rng, seen = random.Random(7), Counter[str]()
    async with cluster(("prefill", "p1"), ("decode", "d1")) as made:
        for worker in made.workers.values():
            worker.faults.token_delay_s = 0.0
        num_turns = 1.0
        for number in range(NUM_TRIES):
            before, deltas = counts(made), list[Delta]()
            task = asyncio.ensure_future(consume(made, asked(number), deltas))
            for _ in range(round(num_turns * rng.uniform(0.8, 1.2))):
                await asyncio.sleep(0)
            kind = rng.choice(("leave", "abort", "deadline"))
            interrupt(made, task, kind, str(number))
            await asyncio.gather(task, return_exceptions=True)
            (outcome,) = (counts(made) - before).elements()  # exactly one
            seen[kind, outcome] += 1
            expect_one_end(deltas, outcome)
            # The end is found by its two sides: the next try comes later, or earlier.
            num_turns = num_turns * 0.8 if outcome == "ok" else num_turns * 1.3 + 1
        await made.quiet()
        flow, fleet = made.gateway.flow, made.gateway.fleet
        assert flow.ledger.taken == flow.ledger.returned == NUM_TRIES
        assert fleet.attempts.held == 0
    ends = {"leave": "cancelled", "abort": "cancelled", "deadline": "deadline"}
    assert seen.keys() == {(kind, outcome) for kind in ends for outcome in ("ok", ends[kind])}, seen
