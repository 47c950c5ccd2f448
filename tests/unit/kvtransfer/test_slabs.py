import torch

from kvtransfer.transport import make_slabs
from tests.fakes.gpu_runtime import gpu


def test_slabs_on_a_gpu_are_in_nobodys_use_any_more():
    """torch gives memory again for the stream that used it; slabs are written by others."""
    with gpu() as device:
        torch.zeros(4, device="cuda:0").copy_(torch.zeros(4, pin_memory=True), non_blocking=True)
        assert device.in_flight
        (slab,) = make_slabs(1, 64, "cuda:0")
        assert slab.is_cuda
        assert not device.in_flight
