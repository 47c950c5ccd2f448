"""Log-probabilities of the prompt: only the worker that computes it has them, and they come first.

In a split attempt the decode worker's tokens may overtake the prefill worker's first frame. They wait here
until the prompt's part has come, so that it always is on the first delta. Pure.
"""

from collections.abc import Sequence

from gateway.attempt import Source
from gateway.inbox import Arrival
from protos.tandem.v1 import common_pb2 as pb
from runtime.errors import TandemError


class PromptLogprobs:
    """Those of one request, across its attempts."""

    def __init__(self, sampling: pb.SamplingParams) -> None:
        self.found: Sequence[pb.TokenLogprob] = ()
        """Of the prompt's tokens from the second one on; empty until they came."""
        self._awaited = sampling.HasField("prompt_logprobs")
        self._attempt = -1
        self._computing = Source.DECODE
        self._held: list[Arrival] = []

    def begin(self, attempt: int, *, split: bool) -> None:
        """Another attempt: what was held of the last one is computed again."""
        self._attempt = attempt
        self._computing = Source.PREFILL if split else Source.DECODE
        self._held = []

    def ask(self, source: Source, submit: pb.Submit) -> None:
        """Let a worker find them if it computes the prompt and they are still missing."""
        if not self._awaited or source is not self._computing:
            submit.sampling.ClearField("prompt_logprobs")

    def admit(self, arrivals: list[Arrival]) -> list[Arrival]:
        """What may be looked at now, in order; tokens of the decode worker wait for the prompt's part."""
        if not self._awaited and not self._held:
            return arrivals
        admitted: list[Arrival] = []
        for arrival in arrivals:
            self._look(arrival)
            if self._awaited and _waits(arrival):
                self._held.append(arrival)
                continue
            admitted.append(arrival)
            if not self._awaited:
                admitted += self._held
                self._held = []
        return admitted

    def _look(self, arrival: Arrival) -> None:
        """The computing worker's first frame has them; a prompt of one token has none."""
        source, attempt, what = arrival
        if not self._awaited or attempt != self._attempt or source is not self._computing:
            return
        if isinstance(what, pb.TokenFrame):
            self.found, self._awaited = what.prompt_logprobs, False
        elif _is_good(what):
            self._awaited = False


def _waits(arrival: Arrival) -> bool:
    return arrival.source is Source.DECODE and _is_good(arrival.what)


def _is_good(what: pb.TokenFrame | pb.AttemptEnd | TandemError) -> bool:
    """Tokens, or an end that is no failure."""
    if isinstance(what, pb.AttemptEnd):
        return not what.HasField("failed")
    return isinstance(what, pb.TokenFrame)
