"""Named points in the product where a test can make a process crash, hang or crawl.

Off, a point is one look at a global bool. With TANDEM_FAULT_DIR in the environment a test arms a point of any
process by writing an action into DIR/NAME:

* `crash`: the process kills itself, as kill -9 does. One process does: it renames the file to NAME.PID.
* `hang`: whoever gets there stands still until the test removes NAME.PID. One process takes it, too.
* `slow SECONDS`: each pass takes so much longer, in all processes, until the test removes the file.

Each pass that was disturbed appends a line to DIR/NAME.hits: proof for the test that its fault took place.
"""

import os
import signal
import threading
from pathlib import Path

VARIABLE = "TANDEM_FAULT_DIR"

POINTS = {
    "prefill.offered": "the prefill worker has offered a transfer",
    "prefill.step": "a step of the prefill worker is done, its outputs are not told",
    "prefill.frame": "a frame's header is posted, its bytes are not sent",
    "prefill.commit": "all frames have left, the Commit has not",
    "decode.reserved": "the decode worker has reserved blocks and answered",
    "decode.frame": "a frame is announced, its bytes have not come",
    "decode.committed": "a Commit is acknowledged, its request has not joined the batch",
    "decode.step": "a step of the decode worker is done, its tokens are not told",
    "decode.moved": "an attempt that goes on behind emitted tokens has come",
}
"""Every point and where it lies."""

_folder = Path(os.environ.get(VARIABLE, ""))

ACTIVE = VARIABLE in os.environ
"""Whether points are looked at; fixed at the start of the process."""


def reach(name: str) -> None:
    """Do what a test has armed this point with. Call it under `if faultpoints.ACTIVE`."""
    assert name in POINTS, name
    armed = _folder / name
    try:
        action, _, seconds = armed.read_text().partition(" ")
    except FileNotFoundError:
        return
    if action == "slow":
        _note(name)
        _pause(float(seconds))
        return
    taken = armed.with_name(f"{name}.{os.getpid()}")
    try:
        armed.rename(taken)
    except FileNotFoundError:
        return  # another process, or thread, was first
    _note(name)
    if action == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    while taken.exists():
        _pause(0.005)


def _pause(seconds: float) -> None:
    """Stand still: that whole threads do is what points are for."""
    threading.Event().wait(seconds)


def _note(name: str) -> None:
    with (_folder / f"{name}.hits").open("a") as hits:
        hits.write(f"{os.getpid()}\n")
