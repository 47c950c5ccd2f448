"""How each row's token is drawn, in host memory: written when another request has the row, and then left."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from engine.drawing import Draw
from engine.request import SamplingParams

INTEGERS = ("seeds", "choices")
FLOATS = ("temperatures", "top_ps", "min_ps")


class DrawRows:
    """One host copy of the buffers named in INTEGERS and FLOATS, and of `top_ks`."""

    def __init__(self, host: Mapping[str, NDArray[np.generic]]) -> None:
        self._host = host
        self._params: list[SamplingParams | None] = [None] * len(host["seeds"])
        self._choices = [0] * len(host["seeds"])

    def write(self, draws: Sequence[Draw]) -> None:
        """How the token of each row is drawn; its position is not written."""
        for row, (params, _, choice) in enumerate(draws):
            if self._params[row] is not params or self._choices[row] != choice:
                self._params[row], self._choices[row] = params, choice
                self._write_row(row, draws[row])

    def _write_row(self, row: int, draw: Draw) -> None:
        host = self._host
        host["seeds"][row], _, host["choices"][row], host["top_ks"][row] = draw.integers
        for name, value in zip(FLOATS, draw.floats, strict=True):
            host[name][row] = value
