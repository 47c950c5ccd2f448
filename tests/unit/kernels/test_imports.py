import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent.parent


def test_without_a_gpu_triton_is_never_loaded():
    program = (
        "import sys, kernels.ops, worker.main, prefill_svc.service, decode_svc.service; print(*sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    loaded = subprocess.check_output([sys.executable, "-c", program], env=environment, text=True).split()
    assert "kernels.ops" in loaded
    assert "triton" not in loaded
