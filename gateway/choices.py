"""The choices of one request as the client gets them: text, ends, usage, and the best of several.

A request generates choices 0..k-1 and returns n of them. All are returned as they come if k is n; otherwise
nothing is returned before all have ended: then the n whose tokens have the largest sum of log-probabilities
are, best first, as choices 0..n-1. The beams of a beam search are chosen by the worker, which reports only
those to return.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

from gateway.attempt import NOTHING, Finished, NewTokens
from gateway.output import Delta, TextOutput, join
from protos.tandem.v1 import common_pb2 as pb


def num_generated(sampling: pb.SamplingParams) -> int:
    """Choices that workers report."""
    if sampling.use_beam_search:
        return max(sampling.n, 1)
    return max(sampling.best_of, sampling.n, 1)


def is_ranked(sampling: pb.SamplingParams) -> bool:
    """More choices are generated than returned: the gateway picks."""
    return num_generated(sampling) > max(sampling.n, 1)


def is_streamable(sampling: pb.SamplingParams) -> bool:
    """Whether tokens can be returned before all choices have ended."""
    return not (sampling.use_beam_search or is_ranked(sampling))


def choices_to_end(submit: pb.Submit) -> set[int]:
    """The choices whose ends are the end of an attempt."""
    if submit.emitted:
        return {emitted.choice for emitted in submit.emitted}
    return set(range(num_generated(submit.sampling)))


class ChoiceOutputs:
    """Text outputs of all choices of a request, and which of them have ended."""

    def __init__(self, outputs: Sequence[TextOutput], num_prompt_tokens: int) -> None:
        self._outputs = outputs
        self._num_prompt_tokens = num_prompt_tokens
        self.going_on = list(range(len(outputs)))
        """Choices that have not ended for the client."""

    def push(self, choice: int, new: NewTokens, finished: Finished | None) -> Delta | None:
        """What new tokens, or the end of the choice on a worker, mean for the client; None: nothing yet.

        A stop string in the tokens ends the choice earlier than the worker does.
        """
        if finished is None and not new.token_ids:
            return None
        output = self._outputs[choice]
        piece = output.push(new)
        delta = Delta(choice=choice, token_ids=piece.token_ids, text=piece.text, logprobs=piece.logprobs)
        if piece.stop is not None:
            return self._end(delta, pb.FINISH_REASON_STOP, piece.stop)
        if finished is None:
            return delta
        text, stop = output.finish()
        delta = replace(delta, text=delta.text + text)
        if stop is not None:
            return self._end(delta, pb.FINISH_REASON_STOP, stop)
        return self._end(delta, finished.reason, output.stop_reason(finished.stop_token_id))

    def abort(self) -> list[Delta]:
        """The ends of all choices that go on."""
        return [
            self._end(Delta(choice=choice), pb.FINISH_REASON_ABORT, None) for choice in list(self.going_on)
        ]

    def end_at(self, choice: int, token_id: int) -> Delta | None:
        """The end of a choice whose latest token is its last, though its worker did not come to say so."""
        reason = self._outputs[choice].end_at(token_id)
        return None if reason is None else self.push(choice, NOTHING, Finished(reason, token_id))

    def _end(self, delta: Delta, reason: pb.FinishReason, stop_reason: str | int | None) -> Delta:
        self.going_on.remove(delta.choice)
        return replace(delta, finish_reason=reason, stop_reason=stop_reason)

    def usage(self, cached_tokens: int) -> pb.Usage:
        """Tokens of all choices that were generated; the prompt counts once."""
        return pb.Usage(
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=sum(output.num_tokens for output in self._outputs),
            cached_tokens=cached_tokens,
        )


async def best(
    deltas: AsyncGenerator[Delta, None], num_returned: int, *, with_logprobs: bool
) -> AsyncGenerator[Delta, None]:
    """Of all choices, the likeliest `num_returned`, each in one delta, renumbered from the best."""
    async with aclosing(deltas):
        wholes = join([delta async for delta in deltas])
    usage = wholes[-1].usage
    wholes.sort(key=lambda whole: -sum(logprob.logprob for logprob in whole.logprobs))
    for rank, whole in enumerate(wholes[:num_returned]):
        yield replace(
            whole,
            choice=rank,
            logprobs=whole.logprobs if with_logprobs else (),
            usage=usage if rank == num_returned - 1 else None,
        )
