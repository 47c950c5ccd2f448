"""Which implementation of an operator runs: the Triton one for tensors on a GPU."""

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from typing import Final, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

HAS_GPU: Final = torch.cuda.is_available() and find_spec("triton") is not None
"""Without one nothing is decided at a call, and Triton is never loaded."""


def by_device(elsewhere: Callable[P, R], module: str, *, has_gpu: bool = HAS_GPU) -> Callable[P, R]:
    """An operator that is the function of the same name in `kernels.<module>` where its first argument, a
    tensor, lies on a GPU, and `elsewhere` where it does not."""
    if not has_gpu:
        return elsewhere
    on_gpu: Callable[P, R] = getattr(import_module(f"kernels.{module}"), elsewhere.__name__)

    @wraps(elsewhere)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        return (on_gpu if cast("Tensor", args[0]).is_cuda else elsewhere)(*args, **kwargs)

    return run
