"""From what the user names to a directory on this machine: a path, or a Hugging Face hub id."""

import hashlib
import importlib.util
import re
from pathlib import Path

from runtime.errors import StartupError

HUB_ID = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?$")

TEXT_FILES = ("*.json", "*.jinja", "tokenizer.model")
"""What the gateway needs of a checkpoint: everything but the weights."""

WEIGHT_FILES = ("*.safetensors",)


def bundled_model() -> Path:
    """Directory of the demo model that ships inside the `tandem` package, found without importing it."""
    spec = importlib.util.find_spec("tandem")
    if spec is None or not spec.submodule_search_locations:
        raise StartupError("--model: the tandem package is not installed; name a directory")
    return Path(next(iter(spec.submodule_search_locations))).resolve() / "demo_model"


def resolve(name: str, *, weights: bool) -> Path:
    """Directory of the checkpoint `name`; the bundled demo model if it is empty.

    An existing directory is taken as it is; a hub id is downloaded through huggingface_hub, whose cache
    and `HF_HUB_OFFLINE` switch hold. Raises StartupError naming what was looked for.
    """
    if not name:
        return bundled_model()
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve()
    if not HUB_ID.match(name) or name.startswith((".", "/", "~")) or path.suffix == ".json":
        raise StartupError(f"--model {name}: no such directory, and not a hub id (owner/name)")
    return _download(name, TEXT_FILES + WEIGHT_FILES if weights else TEXT_FILES)


def _download(hub_id: str, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(patterns)))
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        raise StartupError(
            f"--model {hub_id}: no such directory, and the hub cannot be reached ({_first_line(error)})"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise StartupError(f"--model {hub_id}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, as hex; of nothing if the file is missing."""
    digest = hashlib.sha256()
    if path.is_file():
        digest.update(path.read_bytes())
    return digest.hexdigest()
