"""Puts into volumes what the other containers need: the checkpoint, and the secrets that they share.

A hub id of TANDEM_MODEL is downloaded, a directory is looked for; without either, the demo model in the
image serves. A secret that nobody has given is drawn once and stays in its volume.
"""

import os
import secrets
from pathlib import Path

from runtime.checkpoint_dir import resolve
from runtime.config import fail, parse
from runtime.errors import StartupError
from runtime.settings import ProcessSettings

SECRETS = ("internal_secret", "admin_key")

GIVEN = Path("/run/secrets")
"""What the operator has given; an empty file is nothing."""

SHARED = Path("/var/lib/tandem/secrets")
"""The volume that all of our containers read."""


def main() -> None:
    """Do it; one line on stderr and exit code 2 if that is impossible."""
    try:
        for name in SECRETS:
            share_secret(GIVEN / name, SHARED / name)
        model = parse(ProcessSettings, [], prog="fetch_model").model
        print(f"model: {resolve(model, weights=True)}", flush=True)  # noqa: T201 - the log of the container
    except StartupError as error:
        fail(error)


def share_secret(given: Path, shared: Path) -> None:
    """Write the given secret where the others look for it, or a new one if none is given nor there."""
    try:
        wanted = given.read_text(encoding="utf-8").strip() if given.exists() else ""
        there = shared.read_text(encoding="utf-8").strip() if shared.exists() else ""
        if not there or wanted not in ("", there):
            new = shared.with_suffix(".new")
            new.write_text((wanted or secrets.token_urlsafe(32)) + "\n", encoding="utf-8")
            # Readers have other user ids; the volume itself is seen by nobody else.
            new.chmod(0o444)
            os.replace(new, shared)
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"secret {shared.name}: {error}") from error


if __name__ == "__main__":
    main()
