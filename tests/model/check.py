"""Checks transfer.pml with Spin: `make model`, or `python -m tests.model.check`.

Exit code 0 if the protocol holds and each seeded bug is found. Needs `spin` and a C compiler; without them it
says that it was skipped, and ends with 0. With other sizes: `spin -a -DB=2 -DS=2 -DF=1 transfer.pml`.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

MODEL = Path(__file__).parent / "transfer.pml"
MAX_DEPTH = 100_000
MEMORY_MIB = 6000


@dataclass(frozen=True)
class Run:
    """One verification; `found` is what the model must say, None if nothing is wrong."""

    title: str
    defines: tuple[str, ...] = ()
    found: str | None = None
    cycles: bool = False
    """Look for a run without an end instead of for violated assertions."""


RUNS = (
    Run("two transfers, one block, one slab, two epochs"),
    Run("every run ends", ("F=1",), cycles=True),
    Run("bug: tickets without their epoch", ("NO_EPOCH_CHECK",), found="owner[block_of[found]]==whose"),
    Run("bug: commit without counting frames", ("NO_FRAME_COUNT",), found="scattered[t]==2"),
    Run("bug: wrong bytes count as scattered", ("NO_CHECKSUM",), found="scattered[t]==2"),
    Run("bug: a frame given up keeps its credit", ("NO_CREDIT_BACK",), found="p_credits==1"),
    Run(
        "bug: another thread than the scattering one frees",
        ("FREE_ON_LOOP",),
        found="owner[block_of[found]]==whose",
    ),
)


def build(run: Run, folder: Path) -> None:
    """The verifier `pan` of one run."""
    defines = [f"-D{define}" for define in run.defines]
    subprocess.run(["spin", "-a", *defines, str(MODEL)], cwd=folder, check=True, capture_output=True)
    kind = "-DNP" if run.cycles else "-DSAFETY"
    flags = ["-O2", "-w", kind, "-DCOLLAPSE", f"-DMEMLIM={MEMORY_MIB}"]
    subprocess.run(["cc", *flags, "-o", "pan", "pan.c"], cwd=folder, check=True)


def verify(run: Run) -> tuple[bool, str]:
    """Whether the run says what it must, and its result in words."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(run, folder)
        cycles = ["-l"] if run.cycles else []
        command = ["./pan", f"-m{MAX_DEPTH}", *cycles]
        output = subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout
    return judge(run, output)


def judge(run: Run, output: str) -> tuple[bool, str]:
    """Read pan's output: a search that was cut short proves nothing."""
    error = re.search(r"^pan:1: (.*)", output, re.MULTILINE)
    states = re.search(r"^ *(\S+) states, stored", output, re.MULTILINE)
    if run.found is not None:
        said = error.group(1) if error else "nothing"
        return run.found in said.replace(" ", ""), f"found: {said}"
    whole = "errors: 0" in output and "Search not completed" not in output and "too small" not in output
    count = f"{float(states.group(1)):,.0f} states" if states else "no states"
    return whole, count if whole else f"{count}, {error.group(1) if error else 'search not completed'}"


def main() -> int:
    """Run all; the exit code."""
    if not (shutil.which("spin") and shutil.which("cc")):
        print("SKIPPED: the model needs spin and a C compiler (sudo apt-get install spin gcc)")
        return 0
    good = True
    for run in RUNS:
        right, words = verify(run)
        good &= right
        print(f"{'ok' if right else 'WRONG':6} {run.title}: {words}", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
