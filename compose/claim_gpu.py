"""Gives each replica of a service a GPU of its own, then becomes the worker: `claim_gpu.py tandem decode`.

Every container sees all GPUs: NCCL moves data over NVLink only between devices that both ends can see. So
the replicas agree by themselves which of them computes where:

1. CLAIM_GPUS names the pool of the service by index or UUID (`0,1`); empty means every GPU.
2. A replica takes the first GPU of its pool whose lock file it can lock. The files lie in a volume that all
   replicas of all services share and are named by UUID, for indices are a container's own affair.
3. CUDA_VISIBLE_DEVICES shows the process this GPU only; the driver beneath still reaches the peers.

The lock belongs to the open file, which the worker inherits: it ends with the worker, however that ends.
"""

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

LOCKS = Path("/var/lib/tandem/gpus")

WAIT_S = 10.0
"""A restarted replica may find the lock of its predecessor, which is about to end."""

RETRY_S = 0.25

Gpus = dict[int, str]
"""Index -> UUID."""


def installed_gpus() -> Gpus:
    """The GPUs of this machine, as nvidia-smi names them."""
    command = ["nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader"]
    return parse_gpus(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def parse_gpus(table: str) -> Gpus:
    """From lines like `0, GPU-5a6b…`."""
    rows = [line.split(",") for line in table.splitlines() if line.strip()]
    return {int(index): uuid.strip() for index, uuid in rows}


def pool(names: str, installed: Gpus) -> list[str]:
    """UUIDs of the GPUs in `names`, in that order; ValueError names one that is not there."""
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    known = {**{str(index): uuid for index, uuid in installed.items()}, **{u: u for u in installed.values()}}
    for name in chosen:
        if name not in known:
            raise ValueError(f"GPU {name} is not here; there are {', '.join(known) or 'none'}")
    return list(dict.fromkeys(known[name] for name in chosen or known))


def claim(uuids: Iterable[str], locks: Path) -> str | None:
    """Lock the first free GPU until this process and those it becomes end; None if all are taken."""
    for uuid in uuids:
        file = os.open(locks / f"{uuid}.lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            continue
        os.set_inheritable(file, True)
        return uuid
    return None


def claim_soon(uuids: list[str], locks: Path, sleep: Callable[[float], None] = time.sleep) -> str | None:
    """Like `claim`, but try for WAIT_S."""
    for _ in range(int(WAIT_S / RETRY_S)):
        if (uuid := claim(uuids, locks)) is not None:
            return uuid
        sleep(RETRY_S)
    return None


def main() -> None:
    """Claim, then run the command line in place of this one; exit code 2 if there is no GPU for it."""
    try:
        uuids = pool(os.environ.get("CLAIM_GPUS", ""), installed_gpus())
        uuid = claim_soon(uuids, LOCKS)
        if uuid is None:
            raise ValueError(f"all GPUs of the pool are taken: {', '.join(uuids) or 'it is empty'}")
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: no GPU for {' '.join(sys.argv[1:])}: {error}")
    print(f"{' '.join(sys.argv[1:])} runs on {uuid}", flush=True)  # noqa: T201 - the log of the container
    os.execvpe(sys.argv[1], sys.argv[1:], {**os.environ, "CUDA_VISIBLE_DEVICES": uuid})


if __name__ == "__main__":
    main()
