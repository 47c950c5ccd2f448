"""Who may call: bearer keys and where a caller comes from. Pure.

A key is judged where the call is routed, on the value that routes it; what has no rule of its own needs a
key (`http_access`, `rpc_access`).
"""

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Iterable

from runtime.errors import StartupError

SCHEME = "bearer"

INTERNAL_SECRET_SETTING = "--internal-secret (better: TANDEM_INTERNAL_SECRET_FILE)"
"""How messages name the setting."""


class Keys:
    """Secrets of which any one is enough; only their digests are kept.

    Compared in a time that depends neither on where a guess differs nor on which key it resembles.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._digests = tuple(map(_digest, secrets))

    @classmethod
    def parse(cls, text: str | None) -> "Keys":
        """From a setting: see `split_keys`."""
        return cls(split_keys(text))

    def __bool__(self) -> bool:
        return bool(self._digests)

    def admit(self, authorization: list[str]) -> bool:
        """Whether these values of the header `authorization` are one `Bearer KEY` with a known key."""
        if len(authorization) != 1:
            return False
        scheme, _, secret = authorization[0].partition(" ")
        given = _digest(secret.strip())
        found = False
        for digest in self._digests:
            found |= hmac.compare_digest(given, digest)
        return found and scheme.lower() == SCHEME

    def tenant(self, authorization: list[str]) -> str:
        """Tells the holders of different keys apart, 16 characters; empty where nobody needs a key.

        The caller has been admitted with these values of `authorization`.
        """
        if not self._digests:
            return ""
        return _digest(authorization[0].partition(" ")[2].strip()).hex()[:16]


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def split_keys(text: str | None) -> list[str]:
    """The keys in a setting, which are separated by commas or white space: a file may have one a line."""
    return [key for key in re.split(r"[\s,]+", text or "") if key]


def bearer(secret: str) -> str:
    """The value of `authorization` that shows this key."""
    return f"Bearer {secret}"


def call_metadata(secrets: str | None) -> tuple[tuple[str, str], ...]:
    """gRPC metadata that shows the first of these keys; empty without one."""
    keys = split_keys(secrets)
    return (("authorization", bearer(keys[0])),) if keys else ()


def is_loopback(host: str) -> bool:
    """Whether this address, or `localhost`, can be reached from its own machine only."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return address.is_loopback or (mapped is not None and mapped.is_loopback)


def require_internal_secret(host: str, secret: str | None) -> None:
    """Raise StartupError where others could reach the internal calls of a process without a secret."""
    if not is_loopback(host) and not split_keys(secret):
        raise StartupError(
            f"--host {host}: other machines can reach the internal calls; set {INTERNAL_SECRET_SETTING}, "
            "the same for all processes"
        )
