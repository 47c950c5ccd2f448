"""The choices of one attempt, between the wire and the engine.

A gateway that continues a request names in Submit.emitted every choice that has not ended; on a first
attempt the sampling says how many there are. One choice is a request like any other; several are forks of a
leader that computes their prompt. A beam search is the engine's own business: its choices are its results.
"""

from collections.abc import Mapping

from engine.beam_search import BeamParams, EarlyStopping
from engine.choices import fan_out
from engine.request import Request, TokenLogprob
from engine.sampler import Sample
from kvtransfer.messages import Commit, FirstToken
from protos.tandem.v1 import common_pb2 as pb
from runtime.errors import Internal

EARLY_STOPPING = {
    pb.EARLY_STOPPING_UNSPECIFIED: EarlyStopping.LIKELY,
    pb.EARLY_STOPPING_WHEN_ENOUGH: EarlyStopping.WHEN_ENOUGH,
    pb.EARLY_STOPPING_NEVER: EarlyStopping.NEVER,
}


def to_beams(params: pb.SamplingParams) -> BeamParams | None:
    """The beam search that is asked for; None if none is."""
    if not params.use_beam_search:
        return None
    return BeamParams(
        width=max(params.best_of, params.n, 1),
        num_returned=max(params.n, 1),
        length_penalty=params.length_penalty if params.HasField("length_penalty") else 1.0,
        early_stopping=EARLY_STOPPING[params.early_stopping],
    )


def choices_to_end(submit: pb.Submit) -> set[int]:
    """The attempt ends when each of these has."""
    if submit.sampling.use_beam_search:
        return set(range(max(submit.sampling.n, 1)))
    return set(_emitted(submit))


def with_choices(request: Request, submit: pb.Submit) -> Request:
    """Give a request of nothing but its prompt the choices of an attempt, and what they have emitted."""
    if submit.sampling.use_beam_search:
        return request
    emitted = _emitted(submit)
    if len(emitted) == 1:
        ((request.choice, request.output_token_ids),) = emitted.items()
    else:
        fan_out(request, emitted)
    return request


def _emitted(submit: pb.Submit) -> Mapping[int, list[int]]:
    if submit.emitted:
        return {each.choice: list(each.token_ids) for each in submit.emitted}
    return {choice: [] for choice in range(max(submit.sampling.best_of, submit.sampling.n, 1))}


def continued(request: Request) -> tuple[FirstToken, ...]:
    """First tokens that earlier attempts have emitted; a commit repeats them."""
    return tuple(
        FirstToken(choice=fork.choice, token_id=fork.output_token_ids[0])
        for fork in request.forks
        if fork.output_token_ids
    )


def first_samples(request: Request, commit: Commit) -> dict[int, Sample]:
    """What the sender sampled for each choice that needs it; Internal if that is not in its commit."""
    samples = {}
    for first in commit.first_tokens:
        assert first.logprob is None or isinstance(first.logprob, TokenLogprob)
        samples[first.choice] = Sample(first.token_id, first.logprob)
    for sampler in request.samplers:
        sample = samples.get(sampler.choice)
        if sample is None or (request.search is not None and sample.logprob is None):
            raise Internal(f"the commit lacks the first token of choice {sampler.choice}", retryable=True)
    return samples
