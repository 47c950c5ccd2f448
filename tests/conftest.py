"""What every test needs before the first heavy import."""

import importlib.machinery
import os
import sys

from hypothesis import HealthCheck, settings

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # as in `python -m gateway`
if not os.path.exists("/dev/nvidiactl"):
    # Without a GPU Triton's kernels run in its interpreter, which has to be known when they are defined.
    os.environ.setdefault("TRITON_INTERPRET", "1")


# Tests are the same every time and on every machine, however slow.
settings.register_profile(
    "tandem", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tandem")


class TransformersWithoutKernels:
    """Switches transformers' probe for the PyPI package `kernels` off while transformers is being imported.

    The probe looks for a top-level package of that name, and would find and import ours.
    """

    def find_spec(self, name, path=None, target=None):
        if name != "transformers.utils.import_utils":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            module.is_kernels_available = lambda *args, **kwargs: False

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, TransformersWithoutKernels())
