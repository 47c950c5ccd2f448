import pytest
import torch


@pytest.fixture(
    params=[pytest.param("cpu", id="interpreted"), pytest.param("cuda", id="compiled", marks=pytest.mark.gpu)]
)
def device(request):
    """Where a Triton kernel runs: in Triton's interpreter on a machine without a GPU, compiled on one."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("compiled on this machine: run with -m gpu")
    return torch.device(request.param)


@pytest.fixture
def far_apart(tmp_path, device):
    """(number of elements, type) -> zeros, more than 2**31 of them; on a CPU only pages in use are real."""

    def make(num_elements, dtype):
        if device.type == "cuda":
            return torch.zeros(num_elements, dtype=dtype, device=device)
        return torch.from_file(str(tmp_path / "sparse"), shared=True, size=num_elements, dtype=dtype)

    return make


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Memory that nobody wrote reads as NaN, or as the largest integer."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(make):
    def made(*args, **kwargs):
        memory = make(*args, **kwargs)
        floats = memory.is_floating_point()
        return memory.fill_(torch.nan if floats else torch.iinfo(memory.dtype).max)

    return made
