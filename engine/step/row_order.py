"""Which row of a step each request has: the one that it had before, so that little must be told anew."""

from collections.abc import Sequence

from engine.request import Request


class RowOrder:
    """Rows stay dense: when a request goes, one of the last rows takes its place and all others stay."""

    def __init__(self) -> None:
        self._rows: dict[Request, int] = {}
        """Of the newest step."""

    def arrange(self, requests: Sequence[Request]) -> list[int]:
        """Of each row, the index of its request; each request is named once."""
        num_rows = len(requests)
        order, others = [-1] * num_rows, list[int]()
        for index, request in enumerate(requests):
            row = self._rows.get(request, num_rows)
            if row < num_rows:
                order[row] = index
            else:
                others.append(index)
        if others:
            rest = iter(others)
            order = [next(rest) if index < 0 else index for index in order]
        if others or num_rows < len(self._rows):
            self._rows = {requests[index]: row for row, index in enumerate(order)}
        return order
