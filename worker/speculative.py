"""What `--speculative` says."""

from pathlib import Path

from engine.config import Speculative
from runtime.checkpoint_dir import resolve
from runtime.errors import StartupError

DRAFT_FOLDER = "draft"
"""Inside a checkpoint directory: the draft model that belongs to it."""


def parse_speculative(value: str, model: Path) -> tuple[Speculative, Path | None]:
    """The proposer and the draft model's directory; StartupError if there is no such thing.

    "auto": the draft model inside the checkpoint's directory if there is one, else off.
    """
    kind, _, name = value.partition(":")
    bundled = model / DRAFT_FOLDER
    if value == "auto":
        return ("draft", bundled) if (bundled / "config.json").is_file() else ("off", None)
    if value == "off":
        return "off", None
    if value == "ngram":
        return "ngram", None
    if kind == "draft" and (name or value == "draft"):
        return "draft", resolve(name, weights=True) if name else bundled
    raise StartupError(f"--speculative {value}: expected auto, off, ngram, draft or draft:DIR")
