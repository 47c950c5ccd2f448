"""The process of one section: `python -m benchmarks.gpu_rows.child JOB`."""

import gc
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module, metadata
from types import ModuleType
from typing import Any

import torch

from benchmarks.gpu_rows.bench import Bench, RowFunctions
from benchmarks.gpu_rows.catalogue import SECTIONS, catalogue
from benchmarks.gpu_rows.job import OUT_OF_TIME, Job, Message

MAX_ERROR_LENGTH = 300


class Nothing:
    """What a stand-in's names are: it can be made, and no more."""

    def __init__(self, *arguments: object, **more: object) -> None:
        pass


class StandIn(ModuleType):
    """For a package that the engine imports and these rows do not use."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing


def without_grammars() -> None:
    """Steps without a grammar are measured also where llguidance is not installed."""
    names = ("llguidance", "llguidance.numpy")
    try:
        for name in names:
            import_module(name)
    except ImportError:
        sys.modules.update({name: StandIn(name) for name in names})


def run(job: Job, say: Callable[[Message], None]) -> bool:
    """Measure row by row; False: the device is of no more use to this process."""
    begun = time.monotonic()
    estimates = {row.name: row.estimate_s for row in catalogue()}
    say({"facts": facts()})
    functions = prepare(job)
    for name in job.rows:
        if not job.rehearsal and time.monotonic() - begun + estimates[name] > job.seconds:
            say({"row": name, "error": OUT_OF_TIME})
            continue
        say({"begin": name})
        try:
            say({"row": name, "measured": asdict(functions[name]())})
        except Exception as error:
            say({"row": name, "error": words(error)})
            if not is_usable(job.device):
                return False
        release(job.device)
    return True


def prepare(job: Job) -> RowFunctions:
    """The section's functions, with what they share."""
    bench = Bench(
        section=job.section, device=torch.device(job.device), rehearsal=job.rehearsal, ceilings=job.ceilings
    )
    module = import_module(f"benchmarks.gpu_rows.{SECTIONS[job.section].module}")
    functions: RowFunctions = module.rows(bench)
    return functions


def words(error: BaseException) -> str:
    """One line."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text}"[:MAX_ERROR_LENGTH]


def is_usable(device: str) -> bool:
    """A kernel's illegal access ends the context: every later call fails."""
    if not device.startswith("cuda"):
        return True
    try:
        torch.cuda.synchronize()
        torch.ones(8, device=device).sum().item()
    except RuntimeError:
        return False
    return True


def release(device: str) -> None:
    """A row's memory on the device is free for the next one."""
    if device.startswith("cuda"):
        gc.unfreeze()
        gc.collect()
        torch.cuda.empty_cache()


def facts() -> dict[str, Any]:
    """Versions and the GPU's name."""
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "transformers", "flashinfer-python"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "cuda": torch.version.cuda, "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "L2_bytes": properties.L2_cache_size, "memory_bytes": properties.total_memory,
        }  # fmt: skip
    return found


def main() -> int:
    """Standard output is for messages alone: a library's chatter goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    without_grammars()
    is_well = run(Job.load(sys.argv[1]), lambda message: print(json.dumps(message), file=answers, flush=True))
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
