"""Does the suite find bugs? `make seeded-bugs` puts some in, one at a time, into a copy of the sources.

Each must make the tests named with it fail, and these tests must pass without it. So must the control: a bug
that changes nothing, which no test may fail for.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENGINE = "tests/unit/engine/test_block_tables.py"
INJECTIONS = "tests/unit/kvtransfer/test_injections.py"
LINK_FAULTS = "tests/unit/kvtransfer/test_link_faults.py"


@dataclass(frozen=True)
class Bug:
    """One replacement in one file, and the tests that must find it."""

    name: str
    path: str
    right: str
    wrong: str
    tests: tuple[str, ...]


BUGS = (
    Bug(
        "one free is skipped",
        "engine/block_tables.py",
        "pool.free(reversed(table))",
        "pool.free(reversed(table[1:]))",
        (ENGINE,),
    ),
    Bug(
        "a frame of an older attempt is taken",
        "gateway/attempt.py",
        "if frame.attempt != self.attempt or frame.choice",
        "if frame.choice",
        ("tests/unit/gateway/test_attempt.py",),
    ),
    Bug(
        "tokens that were seen are sent again",
        "gateway/attempt.py",
        "new = NewTokens(frame.token_ids[num_seen:], frame.logprobs[num_seen:])",
        "new = NewTokens(frame.token_ids, frame.logprobs)",
        ("tests/unit/gateway/test_attempt.py",),
    ),
    Bug(
        "checksums are not compared",
        "kvtransfer/receiver.py",
        "if checksum != frame.header.checksum:",
        "if False:",
        (INJECTIONS, LINK_FAULTS),
    ),
    Bug(
        "a rank's stripe can be another one's",
        "kvtransfer/lanes.py",
        "(2 * number + 1) * checksum",
        "checksum",
        ("tests/unit/worker/test_lanes.py",),
    ),
    Bug(
        "a frame of an ended transfer is scattered",
        "kvtransfer/receiver.py",
        "return self._live(frame) is not None",
        "return True",
        (LINK_FAULTS,),
    ),
    Bug(
        "a slab's credit is not given back",
        "kvtransfer/receiver.py",
        "Send(message=Credit(slabs=",
        "Send(message=Credit(slabs=0 *",
        ("tests/unit/kvtransfer/test_interleavings.py",),
    ),
    Bug(
        "a worker lets deadlines pass",
        "worker/attach.py",
        'if submit.HasField("timeout_ms"):',
        "if False:",
        ("tests/unit/worker/test_attach.py",),
    ),
    Bug(
        "a silent attach stream is waited for",
        "gateway/attach.py",
        "self._clock.now() - self._heard_s > HANG_S",
        "False",
        ("tests/integration/test_network_faults.py",),
    ),
    Bug(
        "a gateway that stood still blames the workers",
        "gateway/registry.py",
        "worker.heard_s += seconds",
        "worker.heard_s += 0",
        ("tests/unit/gateway/test_router_registry.py",),
    ),
    Bug(
        "a step that hangs is not noticed",
        "worker/step_watch.py",
        "return overdue_s is not None and self._clock.now() > overdue_s",
        "return False",
        ("tests/unit/worker/test_step_watch.py",),
    ),
)

CONTROL = Bug(
    "nothing at all",
    "kvtransfer/receiver.py",
    "if checksum != frame.header.checksum:",
    "if frame.header.checksum != checksum:",
    (INJECTIONS, LINK_FAULTS),
)


def is_found(bug: Bug, folder: Path) -> bool:
    """Whether the named tests fail in a copy with the bug."""
    path = folder / bug.path
    text = path.read_text()
    assert text.count(bug.right) == 1, f"{bug.path} has no single {bug.right!r}"
    path.write_text(text.replace(bug.right, bug.wrong))
    try:
        return run_tests(folder, bug.tests) != 0
    finally:
        path.write_text(text)


def run_tests(folder: Path, tests: tuple[str, ...]) -> int:
    """pytest's exit code: 0 all pass, 1 some fail; anything else is an error of ours."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--timeout=60", *tests]
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    code = subprocess.run(command, cwd=folder, env=environment, capture_output=True).returncode
    if code not in (0, 1):
        raise RuntimeError(f"{' '.join(command)} exited with {code}")
    return code


def copy_sources(folder: Path) -> None:
    """What git knows of, as it lies here."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True, text=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        source, target = ROOT / name, folder / name
        if source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)


def main() -> int:
    """The exit code: 0 if each bug was found and the control was not."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    failures = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_sources(folder)
        for bug, want in [(CONTROL, False), *((bug, True) for bug in BUGS)]:
            found = is_found(bug, folder)
            failures += found is not want
            said = "found" if found else "not found"
            print(
                f"{'ok   ' if found is want else 'WRONG'} {said}: {bug.name} ({', '.join(bug.tests)})",
                flush=True,
            )
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
