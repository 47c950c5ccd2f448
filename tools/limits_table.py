"""docs/limits.md: `python tools/limits_table.py` writes it, from what the gateway checks."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gateway import exchange, patience  # noqa: E402
from gateway.limits import LIMITS, MAX_LENGTH_PENALTY, Limit  # noqa: E402
from gateway.validation import FLOAT_RANGES, LOGIT_BIAS_RANGE  # noqa: E402
from runtime import http_head  # noqa: E402
from runtime.settings import GatewaySettings  # noqa: E402

FILE = ROOT / "docs" / "limits.md"

HEAD = """# What a request may ask for

A request over a limit is refused before any worker hears of it, and the error names the field: HTTP with the
status below, gRPC with INVALID_ARGUMENT and a BadRequest detail (RESOURCE_EXHAUSTED for a message that is too
large). This page is written by `tools/limits_table.py`; a test asks for the limit and for one more, of every
row and on both faces.

"""

FACES = {"both": "", "http": "HTTP only", "grpc": "gRPC only; HTTP draws an id of its own instead"}


def row(limit: Limit) -> str:
    """One line of the table."""
    most = f"{limit.most:,}".replace(",", " ") if isinstance(limit.most, int) else limit.most
    if limit.most == "--max-body-bytes":
        most = f"`--max-body-bytes`, {GatewaySettings().max_body_bytes >> 20} MiB"
    name = f"`{limit.field}`" if limit.field.replace("_", "").isalpha() else limit.field
    status = "" if limit.faces == "grpc" else str(limit.http_status)
    return f"| {name} | {most} | {limit.unit} | {status} | {FACES[limit.faces]} |"


def render() -> str:
    """The whole page."""
    lines = ["| field | most | of what | HTTP | |", "|---|---|---|---|---|", *map(row, LIMITS)]
    lines += ["", "Numbers must be finite and in these ranges:", "", "| field | range |", "|---|---|"]
    ranges = dict(FLOAT_RANGES) | {"logit_bias, each": LOGIT_BIAS_RANGE}
    for name, each in ranges.items():
        bracket = "(" if each.low_open else "["
        lines.append(f"| {name} | {bracket}{each.low:g}, {each.high:g}] |")
    lines.append(f"| length_penalty | [-{MAX_LENGTH_PENALTY:g}, {MAX_LENGTH_PENALTY:g}] |")
    lines += [
        "",
        f"The head of a request has {http_head.HEAD_TIMEOUT_S:g} s to arrive, a new connection "
        f"{http_head.FIRST_BYTE_TIMEOUT_S:g} s to say something.",
        f"A body has {exchange.BODY_TIMEOUT_S:g} s to arrive; a client that takes nothing for "
        f"{patience.SEND_TIMEOUT_S:g} s is taken for gone.",
        "`--max-concurrent-requests` run, `--max-waiting-requests` more wait; the next is a 429 with a hint.",
        "So is whatever comes while more than `--max-memory-share` of the memory is used.",
    ]
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    FILE.write_text(render(), encoding="utf-8")
