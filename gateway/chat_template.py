"""Chat messages to text, with a checkpoint's Jinja template in a sandbox.

The environment is the one templates are written for (transformers `utils/chat_template_utils.py`):
`trim_blocks`, `lstrip_blocks`, loop controls, `raise_exception`, `strftime_now` and a `tojson` that does not
escape HTML. A request can never bring a template, only messages.

A sandbox keeps a template from reading what it should not, but not from running for ever: `ChatTemplate` is
used in a process of its own (`template_helper`).
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from runtime.errors import CheckpointError, InvalidRequest

MAX_RENDERED_CHARS = 8 * 1024 * 1024
"""A template that writes more than this is refused."""

MAX_SOURCE_CHARS = 1024 * 1024
"""A larger template is refused."""

TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
)
"""What a template can raise on messages that it was not written for."""

SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token")


@dataclass(frozen=True, kw_only=True)
class TemplateSource:
    """A template as it was found, parsed but not compiled: compiling evaluates what is constant in it."""

    source: str
    """Jinja."""
    special_tokens: Mapping[str, str]
    """What it may name."""
    origin: str
    """The file."""

    def __post_init__(self) -> None:
        if len(self.source) > MAX_SOURCE_CHARS:
            raise CheckpointError(self.origin, "chat_template", f"at most {MAX_SOURCE_CHARS} characters")
        try:
            _environment().parse(self.source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise _invalid(self.origin, error) from error


class ChatTemplate:
    """One compiled template and the special tokens that it may name."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], *, origin: str) -> None:
        try:
            self._template = _environment().from_string(source)
        except (*TEMPLATE_ERRORS, MemoryError) as error:
            raise _invalid(origin, error) from error
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Text of the messages with the opening of the assistant's turn.

        Raises InvalidRequest on `messages` if the template refuses them or writes too much.
        """
        pieces: list[str] = []
        num_chars = 0
        try:
            for piece in self._template.generate(
                messages=[dict(message) for message in messages],
                add_generation_prompt=True,
                **self._special_tokens,
            ):
                num_chars += len(piece)
                if num_chars > MAX_RENDERED_CHARS:
                    raise InvalidRequest("the chat template writes too much", field="messages")
                pieces.append(piece)
        except _Refusal as refusal:
            message = f"the chat template refuses these messages: {refusal.message}"
            raise InvalidRequest(message, field="messages") from None
        except MemoryError:
            raise InvalidRequest("the chat template writes too much", field="messages") from None
        except TEMPLATE_ERRORS as error:  # its message may quote the client's
            message = f"the chat template fails on these messages ({type(error).__name__})"
            raise InvalidRequest(message, field="messages") from None
        return "".join(pieces)


class _Refusal(jinja2.TemplateError):
    """The template's own word."""


def _invalid(origin: str, error: Exception) -> CheckpointError:
    return CheckpointError(origin, "chat_template", f"a valid Jinja template ({error})")


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols], loader=None
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.filters["tojson"] = _tojson
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise _Refusal(message)


def _strftime_now(format_: str) -> str:
    return datetime.datetime.now(tz=datetime.UTC).strftime(format_)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def load_chat_template(path: Path, override: str | None) -> TemplateSource | None:
    """The template of a checkpoint directory, or of the file `override`; None if there is none."""
    config = _tokenizer_config(path)
    tokens = {name: text for name in SPECIAL_NAMES if (text := _token_text(config.get(name))) is not None}
    found = _find_source(path, config, override)
    return TemplateSource(source=found[1], special_tokens=tokens, origin=found[0]) if found else None


def _find_source(path: Path, config: dict[str, Any], override: str | None) -> tuple[str, str] | None:
    """(where it was found, source)."""
    if override is not None:
        file = Path(override)
        if not file.is_file():
            raise CheckpointError(f"--chat-template {override}", None, "no such file")
        return str(file), file.read_text(encoding="utf-8")
    file = path / "chat_template.jinja"
    if file.is_file():
        return str(file), file.read_text(encoding="utf-8")
    source = config.get("chat_template")
    if isinstance(source, list):  # several named templates: the default one serves
        source = next((item["template"] for item in source if item.get("name") == "default"), None)
    return (str(path / "tokenizer_config.json"), source) if isinstance(source, str) else None


def _tokenizer_config(path: Path) -> dict[str, Any]:
    file = path / "tokenizer_config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(str(file), None, f"JSON ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(str(file), None, "a JSON object")
    return config


def _token_text(value: Any) -> str | None:
    """A special token as a string or as {"content": ...}."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None
