"""Integers of the host as tensors."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def int64s(values: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """int64, [len(values)] or of rows that are equally long.

    By way of numpy it takes a third of the time of `torch.tensor`.
    """
    return torch.from_numpy(np.array(values, dtype=np.int64)).to(device)
