"""Decode workers without an engine for `make bench-gateway`: real registration, real attach streams.

All workers live in this process and step at a fixed rate, one after the other. A step is one event with a
token for each stream of the worker, as an engine's is. When a token left is written down for the client.
"""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Sequence

import uvloop

from benchmarks.gateway_load import NUM_WORKERS, Case, Stamps, number_of
from gateway.model import load_model
from gateway.tokenizer import TextTokenizer
from protos.tandem.v1 import common_pb2 as pb
from protos.tandem.v1 import registry_pb2
from runtime.checkpoint_dir import bundled_model
from tests.fakes.worker import EOS, FakeWorker, Links

TEXT_LEN = 4
"""Characters of each token's text, so that tokens can be counted by length."""


def echo_ids(tokenizer: TextTokenizer) -> list[int]:
    """Tokens of TEXT_LEN letters or spaces whose ids take two bytes on the wire."""
    vocabulary = tokenizer.vocabulary
    texts = {token_id: vocabulary.token_bytes(token_id) for token_id in range(128, 4096)}
    return [
        token_id
        for token_id, text in texts.items()
        if len(text) == TEXT_LEN and text.replace(b" ", b"a").isalpha()
    ]


class EchoStream:
    """One request on an echo worker."""

    def __init__(self, submit: pb.Submit) -> None:
        self.submit = submit
        self.number = number_of(submit.prompt_token_ids)
        self.num_tokens = 0

    @property
    def has_ended(self) -> bool:
        """It has all tokens that were asked for."""
        return self.num_tokens >= self.submit.sampling.max_tokens

    def end(self) -> pb.AttemptEnd:
        """Says so."""
        finished = pb.ChoiceFinished(reason=pb.FINISH_REASON_LENGTH)
        return pb.AttemptEnd(request=self.submit.request, attempt=self.submit.attempt, finished=finished)

    def frame(self, token_ids: Sequence[int]) -> pb.TokenFrame:
        """The next token."""
        index = self.num_tokens
        self.num_tokens += 1
        return pb.TokenFrame(
            request=self.submit.request,
            attempt=self.submit.attempt,
            start_index=index,
            token_ids=[token_ids[(index + self.number) % len(token_ids)]],
        )


class EchoWorker(FakeWorker):
    """A decode worker whose steps cost almost nothing."""

    def pace(self, first_step_s: float, interval_s: float, token_ids: list[int], stamps: Stamps) -> None:
        """When to step, what to say, and where to note it; before `start`."""
        self._first_s, self._interval_s = first_step_s, interval_s
        self._token_ids, self._stamps = token_ids, stamps

    async def join(self, gateway: str) -> None:
        """Register with one more gateway process."""
        self._gateway = gateway
        self._spawn(self._register())
        await asyncio.sleep(0.01)  # the task has read the address

    async def attach(self, commands: AsyncIterator[pb.AttachCommand]) -> AsyncIterator[pb.AttachEvent]:
        """One event per step."""
        live: dict[int, EchoStream] = {}
        reader = asyncio.ensure_future(self._take(commands, live))
        next_s = self._first_s
        yield pb.AttachEvent(load=self._load())
        try:
            while True:
                await asyncio.sleep(next_s - time.monotonic())
                next_s = max(next_s + self._interval_s, time.monotonic())
                yield self._step(live)
        finally:
            reader.cancel()

    def _step(self, live: dict[int, EchoStream]) -> pb.AttachEvent:
        echoes = list(live.values())
        frames = [echo.frame(self._token_ids) for echo in echoes]
        ended = [echo for echo in echoes if echo.has_ended]
        for echo in ended:
            del live[echo.submit.request]
        now_s = time.monotonic()
        for echo in echoes:
            self._stamps.write(echo.number, echo.num_tokens - 1, now_s)
        load = pb.WorkerLoad(requests_running=len(live))
        return pb.AttachEvent(tokens=frames, ends=[echo.end() for echo in ended], load=load)

    async def _take(self, commands: AsyncIterator[pb.AttachCommand], live: dict[int, EchoStream]) -> None:
        async for command in commands:
            match command.WhichOneof("command"):
                case "submit":
                    live[command.submit.request] = EchoStream(command.submit)
                case "abort":
                    live.pop(command.abort.request, None)


async def serve(gateways: list[str], case: Case, stamps: Stamps) -> None:
    """All workers, until this process is ended."""
    model = load_model(bundled_model(), name="demo", chat_template=None)
    facts = registry_pb2.ModelFacts(
        model_hash="echo",
        tokenizer_hash=model.tokenizer_hash,
        max_model_len=1_000_000,
        vocab_size=4096,
        eos_token_ids=[EOS],
        block_size=16,
        dtype="float32",
    )
    token_ids, start_s = echo_ids(model.tokenizer), time.monotonic()
    for index in range(NUM_WORKERS):
        worker = EchoWorker("decode", f"echo-{index}", gateways[0], Links(), facts)
        worker.pace(start_s + index / NUM_WORKERS / case.rate, 1 / case.rate, token_ids, stamps)
        await worker.start()
        for gateway in gateways[1:]:
            await asyncio.sleep(0)
            await worker.join(gateway)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1].split(","), Case.parse(sys.argv[2]), Stamps(sys.argv[3])))
