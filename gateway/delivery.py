"""The output of one admitted request on its way to the client: measured, traced, the prompt named."""

from dataclasses import replace

from gateway.metrics import GatewayMetrics, RequestMeter
from gateway.output import Delta
from gateway.run import Prepared, RequestRun
from gateway.tracing import RequestTrace
from runtime.clock import SystemClock


class Delivery:
    """A function of deltas rather than a generator around them: a generator more costs 1 µs a token."""

    def __init__(
        self,
        request: Prepared,
        run: RequestRun,
        trace: RequestTrace,
        metrics: GatewayMetrics,
        arrived_s: float,
    ) -> None:
        """`arrived_s` is the request's, on the machine's monotonic clock."""
        # For measuring: uvloop's own time has a resolution of 1 ms.
        self._clock = SystemClock()
        self._request = request
        self._run = run
        self._trace = trace
        self._meter = RequestMeter(metrics, arrived_s, len(request.prompt_token_ids), trace.exemplar)
        self._is_first = True

    def take(self, delta: Delta) -> Delta:
        """What the client gets now; the first delta names the prompt's token ids."""
        now_s = self._clock.now()
        self._meter.on_tokens(now_s, len(delta.token_ids))
        self._trace.on_delta(now_s, delta)
        if not self._is_first:
            return delta
        self._is_first = False
        found = self._run.prompt_logprobs.found
        return replace(delta, prompt_token_ids=self._request.prompt_token_ids, prompt_logprobs=found)

    def end(self) -> None:
        """It has got everything."""
        self._meter.on_end(self._clock.now())
