"""What a row of the GPU table is, and what came of it. Imports nothing heavy: the command knows every row
before torch is loaded."""

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Verdict = Literal["met", "missed", "measured", "unmeasured", "rehearsed"]
"""`measured`: there is a number, but nothing that it must reach, or no floor to hold it against. `rehearsed`:
there is a number that means nothing."""


class Goal(NamedTuple):
    """What one quantity of a row must be."""

    quantity: Literal["ratio", "measured", "excess"]
    """Measured ÷ floor, the number itself, or measured - floor in the row's unit."""
    sense: Literal["<=", ">="]
    limit: float

    def text(self, unit: str) -> str:
        """For a table."""
        sign = "≤" if self.sense == "<=" else "≥"
        words = {
            "ratio": f"{sign} {self.limit:g}×",
            "measured": f"{sign} {self.limit:g} {unit}",
            "excess": f"{sign} + {self.limit:g} {unit}",
        }
        return words[self.quantity]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One number that is to be measured."""

    name: str
    section: str
    """Rows of a section share a process, and what it has prepared."""
    unit: str
    estimate_s: float
    """What it takes on an H200; a row that takes `PATIENCE` times as long is given up."""
    goal: Goal | None = None
    against: str = "floor"
    """What `floor` is: a limit of the machine, or another arm of the same run."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a row's function returns."""

    value: float
    """In the row's unit."""
    floor: float | None = None
    """In the same unit; None: nothing to hold it against."""
    details: dict[str, Any] = field(default_factory=dict)
    """Whatever else belongs to the number: spread, sizes."""
    note: str = ""
    """What must be read with the number, for example a peer's flags."""


def result(row: Row, measured: Measured | None, error: str | None = None) -> dict[str, Any]:
    """The row as it stands in the JSON report; `measured` or `error` is None."""
    quantities = _quantities(measured)
    return {
        "name": row.name,
        "section": row.section,
        "measured": quantities["measured"],
        "unit": row.unit,
        "against": row.against,
        "floor": measured.floor if measured else None,
        "ratio": quantities["ratio"],
        "goal": row.goal.text(row.unit) if row.goal else None,
        "verdict": verdict(row.goal, quantities),
        "error": error,
        "note": measured.note if measured else "",
        "details": measured.details if measured else {},
    }


def _quantities(measured: Measured | None) -> dict[str, float | None]:
    if measured is None:
        return {"measured": None, "ratio": None, "excess": None}
    value, floor = measured.value, measured.floor
    return {
        "measured": value,
        "ratio": value / floor if floor else None,
        "excess": None if floor is None else value - floor,
    }


def verdict(goal: Goal | None, quantities: dict[str, float | None]) -> Verdict:
    """Whether the goal is met."""
    if quantities["measured"] is None:
        return "unmeasured"
    value = quantities[goal.quantity] if goal else None
    if goal is None or value is None:
        return "measured"
    return "met" if (value <= goal.limit if goal.sense == "<=" else value >= goal.limit) else "missed"
