"""What client and echo workers of `make bench-gateway` agree on."""

import json
import mmap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

RING = 64
"""Tokens of a stream that may be under way."""
MAX_STREAMS = 4096
NUM_WORKERS = 16
PROMPT_LEN = 32
FIRST_ID, BASE = 128, 1024


@dataclass(frozen=True, kw_only=True)
class Case:
    """One load."""

    face: Literal["grpc", "http"]
    num_streams: int
    rate: float
    """Tokens per second of each stream."""
    processes: int = 1
    """Of the gateway; two share all cores with the generator."""

    @property
    def offered(self) -> float:
        """Tokens per second."""
        return self.num_streams * self.rate

    def dump(self) -> str:
        """As an argument of a command."""
        return json.dumps(asdict(self))

    @staticmethod
    def parse(text: str) -> "Case":
        """From `dump`."""
        given: dict[str, Any] = json.loads(text)
        return Case(**given)


def prompt_of(number: int) -> list[int]:
    """A prompt that names its stream and shares no block with another's."""
    return [FIRST_ID + number // BASE, FIRST_ID + number % BASE] + [FIRST_ID] * (PROMPT_LEN - 2)


def number_of(prompt_token_ids: Sequence[int]) -> int:
    """The stream whose prompt it is."""
    return (prompt_token_ids[0] - FIRST_ID) * BASE + prompt_token_ids[1] - FIRST_ID


class Stamps:
    """When each token left its worker, on the machine's monotonic clock; shared through a file."""

    SIZE = MAX_STREAMS * RING * 8

    def __init__(self, path: str) -> None:
        with Path(path).open("r+b") as file:
            self._times = memoryview(mmap.mmap(file.fileno(), self.SIZE)).cast("d")

    @classmethod
    def create(cls, path: Path) -> None:
        """An empty file for it."""
        path.write_bytes(bytes(cls.SIZE))

    def write(self, stream: int, index: int, now_s: float) -> None:
        """Token `index` of a stream leaves."""
        self._times[stream * RING + index % RING] = now_s

    def read(self, stream: int, index: int) -> float:
        """When it left."""
        return self._times[stream * RING + index % RING]
