"""Rules of the whole repository that a linter does not know."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = (
    "protos",
    "gateway",
    "prefill_svc",
    "decode_svc",
    "worker",
    "engine",
    "kvtransfer",
    "kernels",
    "runtime",
    "tandem",
)
TORCH_FREE = ("gateway", "tandem", "protos", "runtime")

SOURCES = [
    path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")) if "_pb2" not in path.name
]


@pytest.mark.parametrize("package", PACKAGES)
def test_our_packages_come_from_this_repository(package):
    """PyPI has packages of some of these names; transformers even looks for one called `kernels`."""
    module = importlib.import_module(package)
    assert module.__file__ is not None
    assert Path(module.__file__).is_relative_to(ROOT)


@pytest.mark.parametrize("package", PACKAGES)
def test_init_files_are_empty(package):
    found = [
        path for path in (ROOT / package).rglob("__init__.py") if path != ROOT / "tandem" / "__init__.py"
    ]
    assert [path for path in found if path.read_text()] == []


def imported_by(*packages):
    """Names in sys.modules after importing every module of these packages, in a fresh interpreter."""
    program = f"""
import importlib, pkgutil, sys
for package in {packages!r}:
    found = importlib.import_module(package)
    for info in pkgutil.walk_packages(found.__path__, package + "."):
        if not info.name.endswith("__main__") and "demo_model" not in info.name and "guard" not in info.name:
            importlib.import_module(info.name)
print(*sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_gateway_and_client_never_load_torch():
    loaded = imported_by(*TORCH_FREE)
    assert {"gateway", "tandem.client"} <= loaded
    assert not loaded & {"torch", "triton", "engine", "worker", "kvtransfer", "kernels"}


def banned(path):
    """Each use of something forbidden in a file, as `file:line: name`."""
    tree = ast.parse(path.read_text())
    inside = path.relative_to(ROOT).parts
    owned = _owned_calls(tree)
    for node in ast.walk(tree):
        for name in _names(node):
            if _is_banned(name, inside) and id(node) not in owned:
                yield f"{path.relative_to(ROOT)}:{node.lineno}: {name}"


def _owned_calls(tree):
    """Calls that their surroundings make harmless: `ensure_future` in a function that cancels in a `finally`,
    and the wall clock as a Unix date, `int(time.time())`."""
    owned = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and _cancels_finally(node):
            owned |= {id(call) for call in ast.walk(node) if _names(call) == ["asyncio.ensure_future"]}
        if _names(node) == ["int"]:
            owned |= {id(call) for call in node.args if _names(call) == ["time.time"]}
    return owned


def _cancels_finally(function):
    finals = [last for node in ast.walk(function) if isinstance(node, ast.Try) for last in node.finalbody]
    names = [name for last in finals for node in ast.walk(last) for name in _names(node)]
    return any(name.endswith(".cancel") for name in names)


def _names(node):
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call):
        return [ast.unparse(node.func)]
    return []


def _is_banned(name, inside):
    if name.split(".")[0] in ("pickle", "cloudpickle", "dill", "marshal", "shelve"):
        return True
    if name in ("torch.load", "eval", "exec", "builtins.eval", "builtins.exec", "os.system"):
        return True
    if name.rpartition(".")[2] in ("create_task", "ensure_future") and inside[0] != "runtime":
        # A TaskGroup owns its tasks; a task that the loop alone knows has no owner.
        owner = name.rpartition(".")[0]
        return owner in ("", "asyncio") or "loop" in owner
    return name in ("time.time", "time.monotonic", "time.sleep") and inside != ("runtime", "clock.py")


def test_the_rules_find_what_they_forbid(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "engine.py"
    path.write_text(
        "import pickle\nfrom torch import load\ntorch.load('x')\neval('1')\nasyncio.create_task(f())\n"
        "asyncio.get_running_loop().create_task(f())\ntime.monotonic()\nfrom time import time\n"
        "group.create_task(f())\nmodel.eval()\ntime.perf_counter()\nint(time.time())\n"
        "def f():\n    task = asyncio.ensure_future(g())\n    try: pass\n    finally: task.cancel()\n"
    )
    assert sorted(int(found.split(":")[1]) for found in banned(path)) == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_forbidden(path):
    assert list(banned(path)) == []
