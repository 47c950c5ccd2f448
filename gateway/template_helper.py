"""`python -m gateway.template_helper`: the process that renders a checkpoint's chat template.

The first line of its input is the template; it answers that it is ready, or why the template is none. Then it
reads the messages of one chat per line and answers each with their text. A template that takes too much time
or memory (`helper_child`) kills this process and nothing else. The end of its input ends it.
"""

import json
import sys

from gateway.chat_template import ChatTemplate
from gateway.helper_child import answer, limited_time, ready
from runtime.errors import CheckpointError, InvalidRequest


def main() -> int:
    """Answer until the input ends."""
    opening = json.loads(sys.stdin.readline())
    try:
        with limited_time():
            template = ChatTemplate(**opening)
    except CheckpointError as error:
        answer({"error": error.message})
        return 1
    for request in ready():
        answer(_render(template, request["messages"]))
    return 0


def _render(template: ChatTemplate, messages: list[dict[str, str]]) -> dict[str, str]:
    with limited_time():
        try:
            return {"text": template.render(messages)}
        except InvalidRequest as error:
            return {"error": error.message}


if __name__ == "__main__":
    sys.exit(main())
