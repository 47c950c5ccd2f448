"""The GPU's clocks while a section runs, as nvidia-smi reads them; nothing is set."""

import contextlib
import statistics
import subprocess
import threading
from typing import IO

INTERVAL_MS = 1000
FIELDS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
UNITS = ("MHz SM", "MHz memory", "W", "°C")
QUERY = f"--query-gpu=utilization.gpu,{','.join(FIELDS)}"
COMMAND = ("nvidia-smi", QUERY, "--format=csv,noheader,nounits", "--id=0", f"--loop-ms={INTERVAL_MS}")


class Clocks:
    """Readings of a whole run; without nvidia-smi there are none."""

    def __init__(self) -> None:
        self._readings: list[list[float]] = []
        self._process: subprocess.Popen[str] | None = None
        with contextlib.suppress(OSError):
            self._process = subprocess.Popen(
                COMMAND, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            self._reader = threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True)
            self._reader.start()

    def take(self) -> str:
        """Medians of what was read at work since the last call, as words; empty if there was nothing."""
        readings, self._readings = self._readings, []
        busy = [values for utilization, *values in readings if utilization > 0]
        medians = [statistics.median(column) for column in zip(*busy, strict=True)]
        return ", ".join(f"{value:.0f} {unit}" for value, unit in zip(medians, UNITS, strict=False))

    def close(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._reader.join()
            assert self._process.stdout is not None
            self._process.stdout.close()

    def _read(self, lines: IO[str]) -> None:
        for line in lines:
            with contextlib.suppress(ValueError):  # a field that this GPU does not have
                self._readings.append([float(field) for field in line.split(",")])
