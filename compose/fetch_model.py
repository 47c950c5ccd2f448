"""Puts the checkpoint that TANDEM_MODEL names into the volume of models, once for all workers.

A hub id is downloaded, a directory is looked for; without either, the demo model in the image serves.
"""

from runtime.checkpoint_dir import resolve
from runtime.config import fail, parse
from runtime.errors import StartupError
from runtime.settings import ProcessSettings


def main() -> None:
    """Fetch it; one line on stderr and exit code 2 if that is impossible."""
    try:
        model = parse(ProcessSettings, [], prog="fetch_model").model
        print(f"model: {resolve(model, weights=True)}", flush=True)  # noqa: T201 - the log of the container
    except StartupError as error:
        fail(error)


if __name__ == "__main__":
    main()
