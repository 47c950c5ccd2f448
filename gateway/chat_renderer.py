"""Chat messages to text, off the serving path: the template runs in a helper process that may die of it."""

from collections.abc import Mapping, Sequence

from gateway.chat_template import MAX_RENDERED_CHARS, TemplateSource
from gateway.helper import Helper, HelperDied, HelperRefused
from runtime.errors import CheckpointError, InvalidRequest

HELPER = "gateway.template_helper"

RENDER_TIMEOUT_S = 4.0
"""On the wall; the helper's own limit is CPU time."""

MAX_WAITING = 1024

MAX_LINE_BYTES = 12 * MAX_RENDERED_CHARS
"""A character is at most so many bytes of JSON."""


class ChatRenderer:
    """A checkpoint's chat template at work; belongs to the event loop."""

    def __init__(self, source: TemplateSource) -> None:
        self._source = source
        self._helper = Helper(
            HELPER,
            opening={
                "source": source.source,
                "special_tokens": source.special_tokens,
                "origin": source.origin,
            },
            answer_timeout_s=RENDER_TIMEOUT_S,
            max_line_bytes=MAX_LINE_BYTES,
            max_waiting=MAX_WAITING,
        )

    async def start(self) -> None:
        """Have it ready for the first chat; CheckpointError if the template cannot be used."""
        try:
            await self._helper.start()
        except HelperRefused as refused:
            raise CheckpointError(self._source.origin, "chat_template", str(refused)) from None

    async def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Text of the messages with the opening of the assistant's turn; InvalidRequest if there is none."""
        try:
            async with self._helper.turn():
                answer = await self._helper.ask({"messages": messages})
        except HelperDied:
            raise InvalidRequest("the chat template takes too long", field="messages") from None
        except HelperRefused as refused:
            raise InvalidRequest(str(refused), field="messages") from None
        if "error" in answer:
            raise InvalidRequest(answer["error"], field="messages")
        text: str = answer["text"]
        return text

    async def close(self) -> None:
        """End the helper."""
        await self._helper.close()
