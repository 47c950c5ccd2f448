"""Replicas that share out GPUs among themselves, with files for GPUs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from compose import claim_gpu

TABLE = "0, GPU-aaaa\n1, GPU-bbbb\n2, GPU-cccc\n"
GPUS = {0: "GPU-aaaa", 1: "GPU-bbbb", 2: "GPU-cccc"}


def test_what_nvidia_smi_prints():
    assert claim_gpu.parse_gpus(TABLE) == GPUS
    assert claim_gpu.parse_gpus("") == {}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("", ["GPU-aaaa", "GPU-bbbb", "GPU-cccc"]),
        ("2,0", ["GPU-cccc", "GPU-aaaa"]),
        (" 1 , GPU-bbbb,GPU-aaaa", ["GPU-bbbb", "GPU-aaaa"]),
    ],
)
def test_a_pool_is_named_by_index_or_uuid(names, expected):
    assert claim_gpu.pool(names, GPUS) == expected


def test_a_gpu_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="GPU 7 is not here; there are 0, 1, 2, GPU-aaaa"):
        claim_gpu.pool("0,7", GPUS)


def test_each_replica_takes_another_one_and_the_last_none(tmp_path):
    uuids = list(GPUS.values())
    assert [claim_gpu.claim(uuids, tmp_path) for _ in range(4)] == [*uuids, None]
    pauses = []
    assert claim_gpu.claim_soon(uuids, tmp_path, pauses.append) is None
    assert sum(pauses) == claim_gpu.WAIT_S


def test_the_claim_outlives_exec_and_ends_with_the_process(tmp_path):
    """The program that claims becomes another one, which holds the lock until it ends."""
    program = (
        "import os, sys; from pathlib import Path; from compose import claim_gpu;"
        "claim_gpu.claim(['GPU-aaaa'], Path(sys.argv[1]));"
        "os.execvp('sh', ['sh', '-c', 'echo ready; read line'])"
    )
    root = Path(claim_gpu.__file__).resolve().parent.parent
    replica = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(root)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert replica.stdout.readline() == "ready\n"
    assert claim_gpu.claim(["GPU-aaaa"], tmp_path) is None
    replica.communicate("end\n", timeout=10)
    assert claim_gpu.claim(["GPU-aaaa"], tmp_path) == "GPU-aaaa"
