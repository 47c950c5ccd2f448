"""Tandem for users: `from tandem import Client`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tandem.client import Client

__all__ = ["Client"]


def __getattr__(name: str) -> object:
    """Load gRPC only for who asks for the client: `tandem up --help` need not wait for it."""
    if name != "Client":
        raise AttributeError(f"module 'tandem' has no attribute {name!r}")
    from tandem.client import Client

    return Client
