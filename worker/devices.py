"""Which devices the ranks of a worker use, and how threads turn to them."""

import torch

from runtime.errors import StartupError

CPU = "cpu"


def device_names(devices: str, size: int) -> list[str]:
    """torch's names of one device per rank, from `--devices` and `--tensor-parallel-size`.

    Raises StartupError unless the numbers agree and this machine has every GPU that is named.
    """
    if not devices.strip():
        return [CPU] * size
    numbers = [number.strip() for number in devices.split(",")]
    wrong = [number for number in numbers if not number.isdecimal()]
    if wrong:
        raise StartupError(f"--devices {devices}: {wrong[0]!r} is not the number of a GPU")
    if len(set(numbers)) != size or len(numbers) != size:
        raise StartupError(f"--devices {devices}: --tensor-parallel-size {size} needs {size} different GPUs")
    num_gpus = torch.cuda.device_count()
    missing = [number for number in numbers if int(number) >= num_gpus]
    if missing:
        raise StartupError(f"--devices {devices}: there is no GPU {missing[0]} here, torch sees {num_gpus}")
    return [f"cuda:{int(number)}" for number in numbers]


def use(device: torch.device | str) -> None:
    """Make a device of torch's the calling thread's own: kernels start on that one, whatever they work on."""
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)


def use_apart(device: torch.device | str) -> None:
    """`use`, and what this thread queues waits for no other's: it has a stream of its own.

    Whatever it reads must be complete; see worker.fence.
    """
    use(device)
    if torch.device(device).type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream(device))
