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
