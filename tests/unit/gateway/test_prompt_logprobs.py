"""The prompt's part comes first, whoever is faster."""

import itertools

import pytest

from gateway.attempt import Source
from gateway.inbox import Arrival
from gateway.prompt_logprobs import PromptLogprobs
from protos.tandem.v1 import common_pb2 as pb
from runtime.errors import Unavailable

P, D = Source.PREFILL, Source.DECODE
LOGPROBS = [pb.TokenLogprob(logprob=-1.0), pb.TokenLogprob(logprob=-2.0)]


def frame(source, start, *token_ids, prompt=()):
    return Arrival(source, 0, pb.TokenFrame(start_index=start, token_ids=token_ids, prompt_logprobs=prompt))


def end(source, **outcome):
    return Arrival(source, 0, pb.AttemptEnd(**outcome))


def asked(*, split=True):
    gate = PromptLogprobs(pb.SamplingParams(prompt_logprobs=2))
    gate.begin(0, split=split)
    return gate


DECODE = [frame(D, 0, 5), frame(D, 1, 6), end(D, finished=pb.ChoiceFinished())]
PREFILL = [frame(P, 0, 5, prompt=LOGPROBS), end(P, handed_over=pb.HandedOver())]


def interleaved(places):
    """The arrivals of both workers, each in its own order; the prefill worker's at these places."""
    prefill, decode = iter(PREFILL), iter(DECODE)
    return [next(prefill if place in places else decode) for place in range(5)]


ORDERS = [interleaved(places) for places in itertools.combinations(range(5), 2)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("at_once", [True, False])
def test_nothing_of_the_decode_worker_is_seen_before_the_prompts_part(order, at_once):
    gate, seen = asked(), []
    for arrivals in [order] if at_once else [[arrival] for arrival in order]:
        admitted = gate.admit(arrivals)
        assert list(gate.found) == LOGPROBS or not any(arrival.source is D for arrival in admitted)
        seen += admitted
    assert list(gate.found) == LOGPROBS
    for source in (P, D):
        assert [each for each in seen if each.source is source] == [
            each for each in order if each.source is source
        ]


def test_who_did_not_ask_waits_for_nothing():
    gate = PromptLogprobs(pb.SamplingParams())
    gate.begin(0, split=True)
    assert gate.admit([frame(D, 0, 5)]) == [frame(D, 0, 5)]


def test_only_the_worker_that_computes_the_prompt_is_asked():
    for split, source, wanted in ((True, P, True), (True, D, False), (False, D, True)):
        submit = pb.Submit(sampling=pb.SamplingParams(prompt_logprobs=2))
        gate = asked(split=split)
        gate.ask(source, submit)
        assert submit.sampling.HasField("prompt_logprobs") == wanted
    gate.admit([frame(D, 0, 5, prompt=LOGPROBS)])
    gate.begin(1, split=False)
    gate.ask(D, submit)
    assert not submit.sampling.HasField("prompt_logprobs")


def test_a_prompt_of_one_token_has_none():
    gate = asked(split=False)
    assert gate.admit([frame(D, 0, 5)]) == [frame(D, 0, 5)]
    assert not gate.found


def test_a_lost_prefill_worker_is_heard_at_once_and_what_waited_is_computed_again():
    gate = asked()
    assert gate.admit([frame(D, 0, 5)]) == []
    lost = Arrival(P, 0, Unavailable("gone"))
    assert gate.admit([lost]) == [lost]
    gate.begin(1, split=False)
    again = Arrival(D, 1, pb.TokenFrame(attempt=1, token_ids=[5], prompt_logprobs=LOGPROBS))
    assert gate.admit([again]) == [again]
    assert list(gate.found) == LOGPROBS
