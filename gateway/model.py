"""The served model as the gateway knows it: the text files of its checkpoint."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway.chat_renderer import ChatRenderer
from gateway.chat_template import load_chat_template
from gateway.tokenizer import TextTokenizer
from gateway.validation import FLOAT_RANGES, ModelLimits
from runtime.checkpoint_dir import file_hash
from runtime.errors import CheckpointError, InvalidRequest, NotFound

DEFAULT_FIELDS = ("temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty")
"""Fields of generation_config.json that a request inherits, as in vLLM."""


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """One model under one name."""

    name: str
    """Name in the API."""
    root: Path
    """Directory of the checkpoint."""
    tokenizer: TextTokenizer
    """Text to token ids and back."""
    chat: ChatRenderer | None
    """None: the model has no chat template and chat is refused."""
    tokenizer_hash: str
    """Must equal that of every worker."""
    limits: ModelLimits
    """From the checkpoint; the workers' own limits override it once they are known."""

    def check_name(self, asked: str | None) -> None:
        """Raise NotFound unless the client asked for this model, or for none."""
        if asked and asked != self.name:
            raise NotFound(f"the model {asked!r} does not exist; {self.name!r} is served", field="model")

    def renderer(self) -> ChatRenderer:
        """The chat template at work; InvalidRequest if the model has none."""
        if self.chat is None:
            raise InvalidRequest("this model has no chat template; use completions", field="messages")
        return self.chat


def load_model(path: Path, *, name: str | None, chat_template: str | None) -> ServedModel:
    """Read what the gateway needs of a checkpoint; CheckpointError names file and key."""
    tokenizer = TextTokenizer.load(path)
    config = _read_json(path / "config.json")
    template = load_chat_template(path, chat_template)
    return ServedModel(
        name=name or path.name,
        root=path,
        tokenizer=tokenizer,
        chat=ChatRenderer(template) if template is not None else None,
        tokenizer_hash=file_hash(path / "tokenizer.json"),
        limits=ModelLimits(
            max_model_len=_positive(path, config, "max_position_embeddings"),
            vocab_size=_positive(path, config, "vocab_size"),
            defaults=_sampling_defaults(path / "generation_config.json"),
        ),
    )


def _positive(path: Path, config: Mapping[str, Any], key: str) -> int:
    value = config.get(key, config.get("text_config", {}).get(key))
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(str(path / "config.json"), key, "a positive integer")
    return value


def _sampling_defaults(file: Path) -> dict[str, float]:
    config = _read_json(file) if file.is_file() else {}
    defaults: dict[str, float] = {}
    for name in DEFAULT_FIELDS:
        value = config.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(str(file), name, "a number")
        if name in FLOAT_RANGES:
            _check_default(file, name, value)
        defaults[name] = value
    return defaults


def _check_default(file: Path, name: str, value: float) -> None:
    try:
        FLOAT_RANGES[name].check(value, name)
    except InvalidRequest as error:
        raise CheckpointError(str(file), name, error.message) from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(str(file), None, f"readable JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(str(file), None, "a JSON object")
    return content
