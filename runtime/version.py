"""Versions that peers compare."""

from importlib.metadata import PackageNotFoundError, version

PROTOCOL_MAJOR = 1
"""Peers with another major refuse each other at the handshake."""

try:
    VERSION = version("tandem-llm")
except PackageNotFoundError:  # run from a checkout that is not installed
    VERSION = "0.0.0+checkout"
