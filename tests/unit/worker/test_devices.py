import pytest
import torch

from runtime.errors import StartupError
from worker.devices import device_names, use, use_apart


def test_without_devices_all_ranks_share_the_cpu():
    assert device_names("", 3) == ["cpu"] * 3


@pytest.mark.parametrize(
    ("devices", "size", "reason"),
    [
        ("0", 2, "--tensor-parallel-size 2 needs 2 different GPUs"),
        ("1,1", 2, "--tensor-parallel-size 2 needs 2 different GPUs"),
        ("0,1,2", 2, "--tensor-parallel-size 2 needs 2 different GPUs"),
        ("0,x", 2, "'x' is not the number of a GPU"),
        ("0,-1", 2, "'-1' is not the number of a GPU"),
        ("0,", 2, "'' is not the number of a GPU"),
        ("1,4", 2, "there is no GPU 4 here, torch sees 4"),
    ],
)
def test_what_is_not_there_is_refused(monkeypatch, devices, size, reason):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(StartupError, match=f"--devices {devices}: {reason}"):
        device_names(devices, size)


def test_one_gpu_for_each_rank(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert device_names("3, 01", 2) == ["cuda:3", "cuda:1"]


def test_a_thread_turns_to_its_gpu_and_a_links_to_a_stream_of_its_own(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(("device", str(device))))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"a stream on {device}")
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: calls.append(("stream", stream)))
    use("cpu")
    use_apart(torch.device("cpu"))
    assert not calls
    use_apart(torch.device("cuda:1"))
    assert calls == [("device", "cuda:1"), ("stream", "a stream on cuda:1")]
