"""What a worker makes of the choices of a Submit and of a Commit."""

import pytest

from engine.beam_search import BeamParams, BeamSearch, EarlyStopping
from engine.engine import StepOutput
from engine.request import FinishReason, Request, TokenLogprob
from kvtransfer.messages import Commit, FirstToken
from protos.tandem.v1 import common_pb2 as pb
from runtime.errors import Internal
from worker.choices import choices_to_end, continued, first_samples
from worker.convert import attempt_end, to_request, token_frame


def submit(emitted=None, **sampling) -> pb.Submit:
    neutral = {"max_tokens": 9, "top_p": 1, "repetition_penalty": 1, "typical_p": 1}
    return pb.Submit(
        prompt_token_ids=[3, 4],
        sampling=pb.SamplingParams(**(neutral | sampling)),
        emitted=[pb.ChoiceTokens(choice=key, token_ids=ids) for key, ids in (emitted or {}).items()],
    )


def request_of(message: pb.Submit) -> Request:
    return to_request((0, 1, 1), message, prefill_only=False)


def commit(*tokens: FirstToken) -> Commit:
    return Commit(
        ticket=1, transfer_id=bytes(16), num_frames=0, checksum=0, first_tokens=tokens, cached_tokens=0
    )


@pytest.mark.parametrize(
    ("message", "want"),
    [
        (submit(), {0: []}),
        (submit(n=1, best_of=1), {0: []}),
        (submit({0: [7, 8]}), {0: [7, 8]}),
        (submit({2: [7]}, n=3), {2: [7]}),
    ],
)
def test_one_choice_is_a_plain_request(message, want) -> None:
    request = request_of(message)
    assert {request.choice: request.output_token_ids} == want
    assert not request.forks
    assert choices_to_end(message) == set(want)


@pytest.mark.parametrize(
    ("message", "want"),
    [
        (submit(n=2), {0: [], 1: []}),
        (submit(n=2, best_of=3), {0: [], 1: [], 2: []}),
        (submit({1: [7], 2: []}, n=3), {1: [7], 2: []}),
    ],
)
def test_several_choices_are_forks_of_their_prompt(message, want) -> None:
    request = request_of(message)
    assert not request.output_token_ids
    assert {fork.choice: fork.output_token_ids for fork in request.forks} == want
    assert {fork.key for fork in request.forks} == {request.key}
    assert choices_to_end(message) == set(want)


def test_a_beam_search_ends_with_the_beams_that_it_returns() -> None:
    message = submit(n=2, best_of=5, use_beam_search=True, length_penalty=0.5, early_stopping=2)
    request = request_of(message)
    assert request.sampling.beams == BeamParams(
        width=5, num_returned=2, length_penalty=0.5, early_stopping=EarlyStopping.NEVER
    )
    assert not request.forks
    assert choices_to_end(message) == {0, 1}


def test_a_commit_repeats_what_earlier_attempts_began() -> None:
    request = request_of(submit({0: [7, 8], 2: []}, n=3))
    assert continued(request) == (FirstToken(choice=0, token_id=7),)
    samples = first_samples(
        request, commit(*continued(request), FirstToken(choice=2, token_id=9, logprob=None))
    )
    assert samples[2].token_id == 9
    with pytest.raises(Internal, match="choice 2"):
        first_samples(request, commit(*continued(request)))


def test_a_beam_search_needs_alternatives() -> None:
    request = request_of(submit(n=2, use_beam_search=True))
    assert request.sampling.beams is not None
    request.search = BeamSearch(params=request.sampling.beams, max_tokens=9, stop_token_ids=())
    logprob = TokenLogprob(-1.0, ((5, -1.0),))
    found = first_samples(request, commit(FirstToken(choice=0, token_id=5, logprob=logprob)))
    assert found[0].logprob == logprob
    with pytest.raises(Internal):
        first_samples(request, commit(FirstToken(choice=0, token_id=5)))


def test_frames_and_ends_name_their_choice() -> None:
    request = request_of(submit(n=2))
    output = StepOutput(
        request=request.forks[1], choice=1, start_index=4, token_ids=(7,), finish_reason=FinishReason.STOP,
        stop_token_id=7, score=-2.5,
    )  # fmt: skip
    frame, end = token_frame(1, 1, output), attempt_end(1, 1, output)
    assert (frame.choice, frame.start_index, list(frame.token_ids)) == (1, 4, [7])
    assert (end.finished.choice, end.finished.stop_token_id, end.finished.score) == (1, 7, -2.5)
