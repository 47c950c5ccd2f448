"""The keys that commands and client show. From the environment: a command line is for everybody to read."""

import os
from pathlib import Path

from runtime.access import bearer, split_keys
from runtime.errors import StartupError

API_KEY = "TANDEM_API_KEY"
"""As TANDEM_API_KEY_FILE it names a file that holds the key."""

ADMIN_KEY = "TANDEM_ADMIN_KEY"


def from_environment(variable: str = API_KEY) -> str | None:
    """The first key of this variable, or of the file that VARIABLE_FILE names.

    StartupError if that cannot be read.
    """
    if text := os.environ.get(variable):
        return next(iter(split_keys(text)), None)
    if not (path := os.environ.get(f"{variable}_FILE")):
        return None
    try:
        return next(iter(split_keys(Path(path).read_text(encoding="utf-8"))), None)
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"{variable}_FILE: cannot read {path} ({error})") from error


def http_headers(variable: str = API_KEY) -> dict[str, str]:
    """Headers that show the key; empty without one."""
    key = from_environment(variable)
    return {"authorization": bearer(key)} if key else {}
