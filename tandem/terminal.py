"""`tandem complete` and `tandem chat`: text to and from a person."""

import asyncio
import json
import sys
from collections.abc import Sequence
from typing import Any, cast

from runtime.errors import InvalidRequest, TandemError
from tandem.client import Client
from tandem.messages import Prompt
from tandem.sampling import Sampling, sampling_params

NOT_STREAMED = {"n", "best_of", "use_beam_search"}
"""Fields that ask for more than one text."""


def sampling(
    max_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    seed: int | None,
    stop: Sequence[str] | None,
    options: Sequence[str] = (),
) -> Sampling:
    """What was given on the command line; the rest is left to the server.

    `options`: NAME=VALUE of any sampling field, the value in JSON if it is not a plain text.
    """
    given = cast("Sampling", dict(map(_option, options)))
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
    try:
        sampling_params(given)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"--option: {error}") from None
    return given


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or name not in Sampling.__annotations__:
        raise InvalidRequest(f"--option {text}: expected NAME=VALUE with the name of a sampling field")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def complete(prompt: Prompt, address: str, sampling: Sampling) -> str:
    """Print the answer as it comes, then a newline; several choices when they are whole. Returns the text."""
    if NOT_STREAMED & sampling.keys():
        return asyncio.run(_choices(prompt, address, sampling))
    return asyncio.run(_stream(prompt, address, sampling))


async def _choices(prompt: Prompt, address: str, sampling: Sampling) -> str:
    async with Client(address) as client:
        answer = await client.complete(prompt, **sampling)
    for number, choice in enumerate(answer.choices):
        if len(answer.choices) > 1:
            sys.stdout.write(f"--- choice {number} ({choice.finish_reason})\n")
        sys.stdout.write(choice.text + "\n")
    return answer.text


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
