"""The address that a worker advertises when nobody names one."""

import socket

import pytest

from runtime.errors import StartupError
from runtime.settings import WorkerSettings
from worker import address


def settings(**own: object) -> WorkerSettings:
    return WorkerSettings(gateway=["127.0.0.1:50050"], **own)


def test_only_auto_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address, "interface_addresses", lambda: ["127.0.0.1", "10.1.2.3"])
    for given in (settings(), settings(advertise_host="worker-1"), settings(kv_interface_host="10.9.9.9")):
        assert address.placed(given) is given
    placed = address.placed(settings(advertise_host="auto"))
    assert (placed.advertise_host, placed.kv_interface_host) == ("10.1.2.3", "10.1.2.3")
    placed = address.placed(settings(advertise_host="auto", kv_interface_host="10.9.9.9"))
    assert (placed.advertise_host, placed.kv_interface_host) == ("10.1.2.3", "10.9.9.9")


def test_the_only_interface_needs_no_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address, "interface_addresses", lambda: ["127.0.0.1", "10.1.2.3"])
    assert address.own_address("no-such-gateway.invalid:50050") == "10.1.2.3"


@pytest.mark.parametrize("others", [[], ["10.1.2.3", "10.4.5.6"]])
def test_of_several_interfaces_the_one_towards_the_gateway(
    others: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(address, "interface_addresses", lambda: ["127.0.0.1", *others])
    assert address.own_address("127.0.0.1:50050") == "127.0.0.1"
    with pytest.raises(StartupError, match="--advertise-host auto: no route to gateway nonsense"):
        address.own_address("nonsense:port")


def test_addresses_of_interfaces_are_this_machine_s() -> None:
    found = address.interface_addresses()
    assert "127.0.0.1" in found
    for host in found:  # only an address of our own can be bound
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((host, 0))


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_nobody_is_reached_at_everywhere(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address, "interface_addresses", lambda: ["127.0.0.1", "10.1.2.3"])
    placed = address.placed(settings(host=host))
    assert (placed.host, placed.advertise_host, placed.kv_interface_host) == (host, "10.1.2.3", "10.1.2.3")
    named = settings(host=host, advertise_host="worker-1")
    assert address.placed(named) is named
