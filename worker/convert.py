"""Between the wire and the engine: the only file of the workers that knows both vocabularies."""

import grpc

from engine.engine import StepOutput
from engine.request import FinishReason, Request, SamplingParams, TokenLogprob
from engine.sampler import NO_TOKEN
from protos.tandem.v1 import common_pb2 as pb
from runtime.errors import LinkFailed, TandemError
from runtime.grammars import Grammar
from worker.choices import to_beams, with_choices

FINISH_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORT: pb.FINISH_REASON_ABORT,
    FinishReason.ERROR: pb.FINISH_REASON_ERROR,
}


def to_sampling(submit: pb.Submit) -> SamplingParams:
    """Sampling of an attempt; the gateway has filled every field."""
    params = submit.sampling
    return SamplingParams(
        max_tokens=params.max_tokens,
        min_tokens=params.min_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=max(params.top_k, 0),
        min_p=params.min_p,
        typical_p=params.typical_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        seed=params.seed,
        stop_token_ids=tuple(params.stop_token_ids),
        ignore_eos=params.ignore_eos,
        logit_bias=dict(params.logit_bias),
        allowed_token_ids=tuple(params.allowed_token_ids),
        grammar=to_grammar(params),
        bad_words=tuple(tuple(word.token_ids) for word in submit.bad_words),
        logprobs=params.logprobs if params.HasField("logprobs") else None,
        prompt_logprobs=params.prompt_logprobs if params.HasField("prompt_logprobs") else None,
        beams=to_beams(params),
    )


def to_grammar(params: pb.SamplingParams) -> Grammar | None:
    """What the text must match; None: anything."""
    output = params.structured_output
    kind = output.WhichOneof("constraint")
    if kind is None:
        return None
    return Grammar.of(kind, output.choice.texts if kind == "choice" else getattr(output, kind))


def to_request(key: tuple[int, ...], submit: pb.Submit, *, prefill_only: bool) -> Request:
    """The engine's request of one attempt, its choices included; emitted tokens continue their sequences."""
    request = Request(
        key=key,
        prompt_token_ids=list(submit.prompt_token_ids),
        sampling=to_sampling(submit),
        prefill_only=prefill_only,
        cache_salt=submit.cache_salt.encode(),
        priority=submit.priority,
    )
    return with_choices(request, submit)


def from_logprob(logprob: TokenLogprob) -> pb.TokenLogprob:
    """Log-probability of one token as it travels."""
    top = [pb.TopLogprob(token_id=token, logprob=value) for token, value in logprob.top]
    return pb.TokenLogprob(logprob=logprob.logprob, top=top)


def to_logprob(logprob: pb.TokenLogprob) -> TokenLogprob:
    """The reverse of `from_logprob`."""
    return TokenLogprob(logprob.logprob, tuple((top.token_id, top.logprob) for top in logprob.top))


def token_frame(request: int, attempt: int, output: StepOutput) -> pb.TokenFrame | None:
    """The new tokens of a step; None if there are none."""
    if not output.token_ids:
        return None
    frame = pb.TokenFrame(
        request=request,
        attempt=attempt,
        choice=output.choice,
        start_index=output.start_index,
        token_ids=output.token_ids,
        logprobs=[from_logprob(item) for item in output.logprobs or ()],
        prompt_logprobs=[from_logprob(item) for item in output.prompt_logprobs or ()],
    )
    if output.num_draft_tokens:
        frame.accepted_draft_tokens = len(output.token_ids) - 1
        frame.rejected_draft_tokens = output.num_draft_tokens - frame.accepted_draft_tokens
    if output.start_index == 0:
        frame.cached_tokens = output.num_cached_tokens
    return frame


def attempt_end(request: int, attempt: int, output: StepOutput) -> pb.AttemptEnd | None:
    """The end that a step brought; None while the attempt goes on."""
    if output.error is not None:
        code = grpc.StatusCode.INVALID_ARGUMENT if output.error == NO_TOKEN else grpc.StatusCode.INTERNAL
        failed = pb.AttemptFailed(code=code.value[0], message=output.error)
        return pb.AttemptEnd(request=request, attempt=attempt, failed=failed)
    if output.finish_reason is None:
        return None
    finished = pb.ChoiceFinished(choice=output.choice, reason=FINISH_REASONS[output.finish_reason])
    if output.stop_token_id is not None:
        finished.stop_token_id = output.stop_token_id
    if output.score is not None:
        finished.score = output.score
    return pb.AttemptEnd(request=request, attempt=attempt, finished=finished)


def attempt_failed(request: int, attempt: int, error: TandemError) -> pb.AttemptEnd:
    """An attempt's end by an error."""
    failed = pb.AttemptFailed(
        code=grpc.StatusCode[error.code].value[0],
        message=error.message,
        retryable=error.retryable,
        at_link=isinstance(error, LinkFailed),
    )
    return pb.AttemptEnd(request=request, attempt=attempt, failed=failed)
