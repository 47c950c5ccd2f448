"""Compiles native.c for this machine and loads it.

The library lies in the user's cache directory under a name made of everything that it depends on: source,
options, compiler and processor. Processes that compile at the same time each rename their own file into
place.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("native.c")
OPTIONS = (
    "-O3", "-march=native", "-funroll-loops", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros",
    "-fassociative-math", "-freciprocal-math", "-shared", "-fPIC",
)  # fmt: skip
"""Sums may be reordered, the same way each time; NaN and infinities keep their meaning."""

COMPILE_TIMEOUT_S = 60


def load_library(signatures: Mapping[str, Sequence[Any]]) -> ctypes.CDLL | None:
    """The library with the argument types of its functions set; None without a working compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    try:
        library = ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.SubprocessError):
        return None
    for name, types in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, None
    return library


def _built(compiler: str) -> Path:
    directory = _cache_directory()
    library = directory / f"native-{_digest(compiler)}.so"
    if not library.is_file():
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            output = Path(scratch) / library.name
            subprocess.run(
                [compiler, *OPTIONS, "-o", str(output), str(SOURCE), "-lm"],
                check=True, capture_output=True, timeout=COMPILE_TIMEOUT_S,
            )  # fmt: skip
            output.replace(library)
    return library


def _cache_directory() -> Path:
    """Ours alone: whoever can write there can run code in this process."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    directory = Path(base) / "tandem" / "kernels"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"{directory} can be written by others")
    return directory


def _digest(compiler: str) -> str:
    digest = hashlib.sha256(SOURCE.read_bytes())
    for part in (*OPTIONS, compiler, _compiler_version(compiler), _processor()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:20]


def _compiler_version(compiler: str) -> str:
    """Size and time of the compiler's file: asking it takes a process."""
    status = Path(compiler).resolve().stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def _processor() -> str:
    """Model and instruction sets, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return platform.machine() + platform.processor()
    lines = cpuinfo.read_text().split("\n\n", 1)[0].splitlines()
    return "\n".join(line for line in lines if line.startswith(("model", "flags", "Features", "CPU ")))
