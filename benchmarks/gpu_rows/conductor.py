"""Which rows run when: section by section within a budget, each row's failure its own."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from benchmarks.gpu_rows.catalogue import SECTIONS
from benchmarks.gpu_rows.job import OUT_OF_TIME, Job, Message
from benchmarks.gpu_rows.row import Measured, Row, result
from benchmarks.gpu_rows.spawn import ChildDied, Limits

Spawn = Callable[[Job, Limits], Iterator[Message]]
Result = dict[str, Any]


class Conductor:
    """Results of all rows, one after the other."""

    def __init__(
        self, rows: Sequence[Row], *, device: str, rehearsal: bool, budget_s: float, spawn: Spawn
    ) -> None:
        self._rows = {row.name: row for row in rows}
        self._device = device
        self._rehearsal = rehearsal
        self._ends_s = time.monotonic() + budget_s
        self._spawn = spawn
        self.facts: dict[str, Any] = {}
        """Of the machine, as the processes say."""
        self.results: dict[str, Result] = {}
        """By the row's name."""

    def sections(self) -> Iterable[str]:
        """Those that have rows, in their order."""
        wanted = {row.section for row in self._rows.values()}
        return [section for section in SECTIONS if section in wanted]

    def run(self, section: str) -> Iterator[Result]:
        """Measure a section; a process that dies costs the row that it was at, a new one does the others."""
        while pending := [row for row in self._of(section) if row.name not in self.results]:
            if self._left_s < SECTIONS[section].start_s + pending[0].estimate_s:
                yield from [self._record(row, error=OUT_OF_TIME) for row in pending]
            else:
                yield from self._run_process(section, pending)

    @property
    def _left_s(self) -> float:
        return self._ends_s - time.monotonic()

    def _of(self, section: str) -> list[Row]:
        return [row for row in self._rows.values() if row.section == section]

    def _run_process(self, section: str, pending: list[Row]) -> Iterator[Result]:
        begun: str | None = None
        num_before = len(self.results)
        fault = "the process ended too early"
        try:
            for message in self._spawn(self._job(section, pending), self._limits(section, pending)):
                self.facts |= message.get("facts", {})
                begun = message.get("begin")
                if "row" in message:
                    yield self._take(message)
        except ChildDied as error:
            fault = str(error)
        if begun is not None:
            yield self._record(self._rows[begun], error=fault)
        elif len(self.results) == num_before:
            yield from [self._record(row, error=fault) for row in pending]

    def _job(self, section: str, pending: list[Row]) -> Job:
        values = {name: each["measured"] for name, each in self.results.items()}
        ceilings = {row.name: values[row.name] for row in self._of("ceilings") if values.get(row.name)}
        return Job(
            section=section,
            rows=[row.name for row in pending],
            device=self._device,
            rehearsal=self._rehearsal,
            seconds=self._left_s,
            ceilings=ceilings,
        )

    @staticmethod
    def _limits(section: str, pending: list[Row]) -> Limits:
        return {None: SECTIONS[section].start_s} | {row.name: row.estimate_s for row in pending}

    def _take(self, message: Message) -> Result:
        row = self._rows[message["row"]]
        measured = message.get("measured")
        return self._record(row, Measured(**measured) if measured else None, message.get("error"))

    def _record(self, row: Row, measured: Measured | None = None, error: str | None = None) -> Result:
        self.results[row.name] = result(row, measured, error)
        if self._rehearsal and measured is not None:
            self.results[row.name]["verdict"] = "rehearsed"
        return self.results[row.name]
