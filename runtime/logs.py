"""Logging of a process: text for a person at a terminal, JSON lines for a collector.

Nobody waits for whoever reads stderr, or does not: all that Python writes there goes through a PatientStream.
"""

import atexit
import io
import json
import logging
import sys
import time

from runtime.patient_stream import PatientStream

OURS = (
    "gateway",
    "worker",
    "prefill_svc",
    "decode_svc",
    "engine",
    "kvtransfer",
    "kernels",
    "runtime",
    "tandem",
)
"""Packages that log at the level asked for; of others only warnings: nobody knows whom they quote."""

LEVELS = {name: getattr(logging, name.upper()) for name in ("debug", "info", "warning", "error")}

LAST_WORDS_S = 1.0
"""What waits to be written at the end of a process has this long."""

FIELDS = ("request_id", "worker", "link")


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message and the known extra fields."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        line: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def setup(service: str, level: str, style: str) -> None:
    """Send all logging to stderr, which never blocks from now on; `style` is auto, text or json."""
    _make_patient()
    handler = logging.StreamHandler(sys.stderr)
    if style == "json" or (style == "auto" and not sys.stderr.isatty()):
        handler.setFormatter(JsonFormatter(service))
    else:
        handler.setFormatter(
            logging.Formatter(f"%(asctime)s %(levelname)-7s {service} %(message)s", datefmt="%H:%M:%S")
        )
    logging.basicConfig(level=max(logging.WARNING, LEVELS[level]), handlers=[handler], force=True)
    for package in OURS:
        logging.getLogger(package).setLevel(LEVELS[level])


def last_words() -> None:
    """Before a process leaves: what was logged gets out, unless nobody reads it."""
    if isinstance(sys.stderr, PatientStream):
        sys.stderr.drain(LAST_WORDS_S)


def _make_patient() -> None:
    if isinstance(sys.stderr, PatientStream):
        return
    try:
        sys.stderr = PatientStream(sys.stderr.fileno())
    except io.UnsupportedOperation:
        return  # somebody has put memory in its place, which never blocks
    atexit.register(last_words)
