"""`python -m gateway [flags]`: one gateway process."""

import sys

from gateway.main import serve
from runtime import config, lifecycle, logs
from runtime.errors import StartupError
from runtime.settings import GatewaySettings


def main(argv: list[str]) -> int:
    """Run a gateway with these flags; returns the exit code."""
    try:
        settings = config.parse(GatewaySettings, argv, prog="tandem gateway")
    except StartupError as error:
        config.fail(error)
    logs.setup("gateway", settings.log_level, settings.log_format)
    return lifecycle.run(lambda shutdown: serve(settings, shutdown))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
