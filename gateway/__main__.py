"""`python -m gateway [flags]`: one gateway process."""

import os
import sys

from runtime import config, lifecycle, logs
from runtime.errors import StartupError
from runtime.settings import GatewaySettings


def main(argv: list[str]) -> int:
    """Run a gateway with these flags; returns the exit code."""
    try:
        settings = config.parse(GatewaySettings, argv, prog="tandem gateway")
    except StartupError as error:
        config.fail(error)
    # Read when gRPC is loaded. Otherwise it handles our forks, and every fourth helper process that starts
    # while its threads run crashes in there, before its first instruction (grpcio 1.82.3).
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
    from gateway.main import serve

    logs.setup("gateway", settings.log_level, settings.log_format)
    return lifecycle.run(lambda shutdown: serve(settings, shutdown))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
