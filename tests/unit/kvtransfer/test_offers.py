import pytest
import torch

from kvtransfer.offers import Transports
from kvtransfer.transports.segment import Segment
from runtime.errors import StartupError

CPU = torch.device("cpu")


def test_auto_offers_all_that_the_device_allows_best_first():
    assert Transports.of("auto", CPU).names == ("shm", "gloo")
    assert Transports.of("gloo", CPU).names == ("gloo",)


@pytest.mark.parametrize("setting", ["nccl", "cuda_ipc"])
def test_a_transport_that_this_worker_cannot_use_fails_its_start(setting):
    with pytest.raises(StartupError, match=f"--transport {setting}: this worker can use shm, gloo"):
        Transports.of(setting, CPU)


def test_memory_is_proven_by_opening_it():
    ours = Transports.of("auto", CPU)
    with ours.proofs() as (shm, gloo):
        assert ours.refusal("shm", shm) is None
        assert ours.refusal("gloo", gloo) is None
    # What one process can open now another one cannot open later.
    assert "out of reach" in ours.refusal("shm", shm)
    assert Transports.of("gloo", CPU).refusal("shm", shm) == "this worker uses gloo"
    assert "uses shm, gloo" in ours.refusal("carrier pigeon", b"")


def test_what_has_failed_is_left_out_but_for_the_last_resort():
    ours = Transports.of("auto", CPU)
    assert ours.without({"shm"}).names == ("gloo",)
    assert ours.without({"shm", "gloo"}).names == ("gloo",)
    assert ours.without({"gloo"}).names == ("shm", "gloo")
    assert Transports.of("shm", CPU).without({"shm"}).names == ("shm",)


def test_without_memory_for_a_proof_the_transport_is_refused(monkeypatch):
    def fail(num_bytes):
        raise OSError("too many open files")

    ours = Transports.of("auto", CPU)
    monkeypatch.setattr(Segment, "create", fail)
    with ours.proofs() as (shm, _):
        assert "out of reach" in ours.refusal("shm", shm)
