"""What a worker's KV links will take of its GPU."""

import pytest

from kvtransfer.plan import MAX_SLAB_BYTES
from kvtransfer.transport import NUM_SLABS
from runtime.settings import WorkerSettings
from worker.transports import NUM_COUNTED_LINKS, link_memory_bytes

ON_GPU = NUM_COUNTED_LINKS * NUM_SLABS * MAX_SLAB_BYTES["nccl"]


@pytest.mark.parametrize(
    ("transport", "ranks", "device", "expected"),
    [
        ("auto", 1, "cuda:1", ON_GPU),
        ("nccl", 1, "cuda:0", ON_GPU),
        ("cuda_ipc", 1, "cuda:0", ON_GPU),
        ("gloo", 1, "cuda:0", 0),
        ("shm", 1, "cuda:0", 0),
        ("auto", 2, "cuda:0", ON_GPU),
        ("auto", 1, "cpu", 0),
    ],
)
def test_slabs_that_lie_on_the_gpu_are_counted(
    transport: str, ranks: int, device: str, expected: int
) -> None:
    settings = WorkerSettings(transport=transport, tensor_parallel_size=ranks)
    assert link_memory_bytes(settings, device) == expected
