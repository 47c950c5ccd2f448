"""What a process of the benchmark is told, and what it says: lines of JSON on its standard output.

`{"facts": …}` at the start; `{"begin": name}` before each row; behind it `{"row": name, "measured": …}` or
`{"row": name, "error": …}`. Whoever dies in between is known by the row that has begun.
"""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

Message = dict[str, Any]
OUT_OF_TIME = "not begun: no time left in the budget"


@dataclass(frozen=True, kw_only=True)
class Job:
    """Some rows of one section."""

    section: str
    rows: list[str]
    device: str
    rehearsal: bool
    seconds: float
    """No row is begun that would not end within these."""
    ceilings: dict[str, float] = field(default_factory=dict)
    """See bench.Bench."""

    def dump(self) -> str:
        """For a command line."""
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> "Job":
        """From a command line."""
        return cls(**json.loads(text))
