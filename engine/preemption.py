"""How a running request loses its blocks: to host memory, to be computed again here, or elsewhere."""

from typing import Literal

from engine.outputs import PreemptionMode
from engine.request import Request
from engine.swap_space import SwapSpace

PreemptionChoice = Literal["auto", "swap", "recompute"]


class Preemption:
    """Chooses the mode: swap while host memory has room.

    When it has none, "swap" and "recompute" prefill again here. "auto" does so for sequences that one step
    can compute and for those that were prefilled here; it hands the others back, because a long prefill
    here would take the steps of every running request.
    """

    def __init__(self, choice: PreemptionChoice, swap_space: SwapSpace, *, max_step_tokens: int) -> None:
        self._choice = choice
        self._swap_space = swap_space
        self._max_step_tokens = max_step_tokens

    def mode(self, request: Request) -> PreemptionMode:
        """What to do with a running request."""
        if self._choice != "recompute" and self._swap_space.has_room(request):
            return PreemptionMode.SWAP
        is_long = request.num_tokens > self._max_step_tokens
        if self._choice == "auto" and request.transferred and is_long and not _is_beam(request):
            return PreemptionMode.HAND_BACK
        return PreemptionMode.RECOMPUTE


def _is_beam(request: Request) -> bool:
    """A search emits nothing before its end: handed back, it could start from nothing for ever."""
    return request.leader is not None and request.leader.search is not None
