"""From what a client sends to the prompt's token ids, without holding up the event loop."""

import asyncio
from collections.abc import Callable, Mapping, Sequence

from gateway.limits import MAX_MESSAGES
from gateway.model import ServedModel
from gateway.tokenizer import TextTokenizer
from runtime.errors import ContextLengthExceeded, InvalidRequest

MAX_RENDER_S = 5.0
"""A chat whose text is not there by then is refused; so are those that wait behind a slow template."""

LARGE_TEXT_CHARS = 4096
"""Longer texts are worked on in a thread: this many take about a millisecond."""

Messages = tuple[Mapping[str, str], ...]
"""Chat messages: `role` and `content`, both text."""


async def tokenize(
    model: ServedModel,
    prompt: str | Messages,
    *,
    add_special_tokens: bool = True,
    max_tokens: int | None = None,
) -> list[int]:
    """Token ids of a text, or of chat messages in the model's chat template.

    Raises InvalidRequest for an empty text and for messages that the template refuses, and
    ContextLengthExceeded, without any work, for a prompt that must have more than `max_tokens`.
    """
    if max_tokens is not None:
        _check_size(model, prompt, max_tokens)
    if isinstance(prompt, str):
        return await _tokenize_text(model, prompt, add_special_tokens)
    if not prompt:
        raise InvalidRequest("messages must not be empty", field="messages")
    check_num_messages(len(prompt))
    return await _tokenize_messages(model, prompt)


def check_num_messages(num_messages: int) -> None:
    """Raise InvalidRequest for a chat that is too long to be looked at."""
    if num_messages > MAX_MESSAGES:
        raise InvalidRequest(f"messages: at most {MAX_MESSAGES}, got {num_messages}", field="messages")


def _check_size(model: ServedModel, prompt: str | Messages, max_tokens: int) -> None:
    contents = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
    if sum(map(len, contents)) > model.tokenizer.max_chars(max_tokens):
        name = "prompt" if isinstance(prompt, str) else "messages"
        raise ContextLengthExceeded(
            f"{name}: more text than the model's context of {max_tokens} tokens can hold", field=name
        )


async def _tokenize_text(model: ServedModel, text: str, add_special_tokens: bool) -> list[int]:
    if not text:
        raise InvalidRequest("prompt must not be empty", field="prompt")
    return await _off_loop(
        len(text), lambda: model.tokenizer.encode_text(text, add_special_tokens=add_special_tokens)
    )


async def _tokenize_messages(model: ServedModel, messages: Messages) -> list[int]:
    renderer = model.renderer()
    shield = model.tokenizer.shield()
    protected = [{name: shield.protect(text) for name, text in message.items()} for message in messages]
    try:
        async with asyncio.timeout(MAX_RENDER_S):
            rendered = await renderer.render(protected)
    except TimeoutError:
        raise InvalidRequest("the chat template takes too long", field="messages") from None
    return await _off_loop(len(rendered), lambda: model.tokenizer.encode_rendered(rendered, shield))


def bad_word_token_ids(tokenizer: TextTokenizer, words: Sequence[str]) -> list[list[int]]:
    """Token sequences of words that must not be generated, at the start and in the middle of a text."""
    spellings = [prefix + word.lstrip() for word in words for prefix in ("", " ")]
    sequences = (tuple(tokenizer.encode_text(text, add_special_tokens=False)) for text in spellings)
    return [list(sequence) for sequence in dict.fromkeys(sequences) if sequence]


async def _off_loop(num_chars: int, work: Callable[[], list[int]]) -> list[int]:
    return work() if num_chars <= LARGE_TEXT_CHARS else await asyncio.to_thread(work)
