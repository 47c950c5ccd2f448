"""Where others find this worker: `--advertise-host auto`.

A container cannot know its address beforehand. With one interface besides loopback there is nothing to
choose, and the gateway need not run yet; with several, the one that routes to the gateway is right.
"""

import fcntl
import socket
import struct

from runtime.errors import StartupError
from runtime.settings import WorkerSettings

AUTO = "auto"

WILDCARDS = ("0.0.0.0", "::")
"""Addresses to listen on that nobody can be reached at."""

SIOCGIFADDR = 0x8915
"""Linux's request for the IPv4 address of an interface, see netdevice(7)."""

INTERFACE_REQUEST = struct.Struct("16s 4x 4s 16x")
"""struct ifreq with a sockaddr_in: the name, family and port (ignored), the address."""


def placed(settings: WorkerSettings) -> WorkerSettings:
    """`settings` with `auto` replaced by an address; the KV sockets use it too unless told otherwise.

    A worker that listens everywhere and does not say where it is reached is placed alike. Raises StartupError
    where no address can be found.
    """
    unplaced = settings.advertise_host is None and settings.host in WILDCARDS
    if settings.advertise_host != AUTO and not unplaced:
        return settings
    host = own_address(settings.gateway[0])
    kv_host = settings.kv_interface_host or host
    return settings.model_copy(update={"advertise_host": host, "kv_interface_host": kv_host})


def own_address(gateway: str) -> str:
    """This machine's IPv4 address: its only one, or the one towards `gateway` (host:port)."""
    found = [address for address in interface_addresses() if not address.startswith("127.")]
    return found[0] if len(found) == 1 else _address_towards(gateway)


def interface_addresses() -> list[str]:
    """The first IPv4 address of every interface that has one."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = INTERFACE_REQUEST.pack(name.encode(), bytes(4))
            try:
                answer = fcntl.ioctl(probe, SIOCGIFADDR, request)
            except OSError:  # it has none
                continue
            found.append(socket.inet_ntoa(INTERFACE_REQUEST.unpack(answer)[1]))
    return found


def _address_towards(gateway: str) -> str:
    host, _, port = gateway.rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, int(port)))  # chooses a route, sends nothing
        except (OSError, ValueError) as error:
            raise StartupError(f"--advertise-host auto: no route to gateway {gateway} ({error})") from error
        address: str = probe.getsockname()[0]
    return address
