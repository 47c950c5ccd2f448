"""`tandem complete` and `tandem chat`: text to and from a person."""

import asyncio
import sys
from collections.abc import Sequence

from runtime.errors import TandemError
from tandem.client import Client
from tandem.messages import Prompt, Sampling


def sampling(
    max_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    seed: int | None,
    stop: Sequence[str] | None,
) -> Sampling:
    """What was given on the command line; the rest is left to the server."""
    given = Sampling()
    if max_tokens is not None:
        given["max_tokens"] = max_tokens
    if temperature is not None:
        given["temperature"] = temperature
    if top_p is not None:
        given["top_p"] = top_p
    if seed is not None:
        given["seed"] = seed
    if stop:
        given["stop"] = stop
    return given


def complete(prompt: Prompt, address: str, sampling: Sampling) -> str:
    """Print the answer as it comes, then a newline; returns its text."""
    return asyncio.run(_stream(prompt, address, sampling))


async def _stream(prompt: Prompt, address: str, sampling: Sampling) -> str:
    text = []
    try:
        async with Client(address) as client:
            async for delta in client.generate(prompt, **sampling):
                text.append(delta.text)
                sys.stdout.write(delta.text)
                sys.stdout.flush()
    finally:
        if text:
            sys.stdout.write("\n")
            sys.stdout.flush()
    return "".join(text)


class Conversation:
    """A chat that remembers what was said; an answer that failed or was cut short is not remembered."""

    def __init__(self, address: str, sampling: Sampling, system: str | None = None) -> None:
        self._address = address
        self._sampling = sampling
        self.messages: list[dict[str, str]] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})

    def turn(self, text: str) -> str:
        """Say `text`, print and return the answer."""
        question = {"role": "user", "content": text}
        answer = complete([*self.messages, question], self._address, self._sampling)
        self.messages += [question, {"role": "assistant", "content": answer}]
        return answer

    def repl(self) -> None:
        """Turns until Ctrl-D, or Ctrl-C at the prompt."""
        import readline  # noqa: F401 - importing it gives input() editing and history

        while True:
            try:
                text = input("> ").strip()
            except EOFError:
                return
            if text:
                self._try_turn(text)

    def _try_turn(self, text: str) -> None:
        try:
            self.turn(text)
        except KeyboardInterrupt:
            pass  # ends the answer, not the conversation
        except TandemError as error:
            sys.stderr.write(f"error: {error.message}\n")
