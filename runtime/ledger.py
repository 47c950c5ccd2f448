"""What a process has taken and given back since its start: equal when nothing runs."""

import asyncio
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OPEN_FILES = Path("/proc/self/fd")


@dataclass(slots=True)
class Account:
    """One kind of thing. Its owner counts; any thread may read."""

    taken: int = 0
    returned: int = 0

    @property
    def held(self) -> int:
        """Taken and not given back."""
        return self.taken - self.returned


def describe(**accounts: Account) -> dict[str, dict[str, int]]:
    """`ledger` of /debug/state."""
    return {
        name: {"taken": account.taken, "returned": account.returned} for name, account in accounts.items()
    }


def process_counts() -> dict[str, Any]:
    """What else a process can leak, for /debug/state; on the event loop."""
    return {
        "tasks": len(asyncio.all_tasks()),
        "threads": threading.active_count(),
        "fds": len(list(OPEN_FILES.iterdir())) if OPEN_FILES.exists() else None,
    }
