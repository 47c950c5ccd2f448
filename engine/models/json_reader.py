"""Typed access to a JSON object of a checkpoint; every complaint names file and key."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import CheckpointError


@dataclass(frozen=True)
class JsonReader:
    """A JSON object and where it comes from."""

    file: str
    values: Mapping[str, Any]
    prefix: str = ""
    """Of the key in messages: "rope_parameters." inside a nested object."""

    @classmethod
    def open(cls, path: Path) -> "JsonReader":
        """Read a file that must hold one JSON object."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(str(path), None, "no such file") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(str(path), None, f"not readable as JSON ({error})") from error
        if not isinstance(values, dict):
            raise CheckpointError(str(path), None, f"expected a JSON object, got {type(values).__name__}")
        return cls(str(path), values)

    def error(self, key: str, expected: str) -> CheckpointError:
        """What to raise when the value of `key` is not as expected."""
        return CheckpointError(self.file, self.prefix + key, expected)

    def nested(self, key: str) -> "JsonReader | None":
        """The object under `key`; None if it is missing or null."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.error(key, f"expected an object, got {value!r}")
        return None if value is None else JsonReader(self.file, value, f"{key}.")

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer; null counts as missing."""
        value = self._get(key, default)
        if type(value) is not int or value < 1:
            raise self.error(key, f"expected a positive integer, got {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive finite number; null counts as missing."""
        value = self._get(key, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self.error(key, f"expected a positive number, got {value!r}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """true or false; null counts as missing."""
        value = self._get(key, default)
        if type(value) is not bool:
            raise self.error(key, f"expected true or false, got {value!r}")
        return value

    def text(self, key: str) -> str:
        """A string."""
        value = self._get(key, None)
        if type(value) is not str:
            raise self.error(key, f"expected a string, got {value!r}")
        return value

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None and default is None:
            raise self.error(key, "missing")
        return default if value is None else value
