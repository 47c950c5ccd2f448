"""Which tokens a sequence has seen and how often it has emitted them, kept up to date token by token."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray


class TokenCounts:
    """Distinct tokens in order of first sight; appending costs O(1), whatever came before."""

    def __init__(self, prompt_token_ids: Sequence[int]) -> None:
        seen = dict.fromkeys(prompt_token_ids)
        self._places = {token_id: place for place, token_id in enumerate(seen)}
        capacity = len(seen) + 64
        self._token_ids = np.zeros(capacity, dtype=np.int64)
        self._token_ids[: len(seen)] = list(seen)
        self._outputs = np.zeros(capacity, dtype=np.float32)

    @property
    def token_ids(self) -> NDArray[np.int64]:
        """The distinct tokens, [num_distinct]; a view."""
        return self._token_ids[: len(self._places)]

    @property
    def outputs(self) -> NDArray[np.float32]:
        """How often each of them was emitted, [num_distinct]; 0 for those of the prompt alone; a view."""
        return self._outputs[: len(self._places)]

    def emit(self, token_ids: Iterable[int]) -> None:
        """Count further output tokens."""
        for token_id in token_ids:
            place = self._places.setdefault(token_id, len(self._places))
            if place == len(self._token_ids):
                self._token_ids = np.concatenate((self._token_ids, np.zeros_like(self._token_ids)))
                self._outputs = np.concatenate((self._outputs, np.zeros_like(self._outputs)))
            self._token_ids[place] = token_id
            self._outputs[place] += 1
