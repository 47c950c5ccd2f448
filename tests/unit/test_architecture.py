"""Rules of the whole repository that a linter does not know."""

import ast
import importlib
import os
import re
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
    path
    for package in (*PACKAGES, "compose")
    for path in sorted((ROOT / package).rglob("*.py"))
    if "_pb2" not in path.name
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
            if (_is_banned(name, inside) or _runs_what_it_reads(name)) and id(node) not in owned:
                yield f"{path.relative_to(ROOT)}:{node.lineno}: {name}"
        if isinstance(node, ast.keyword) and _is_banned_argument(node):
            yield f"{path.relative_to(ROOT)}:{node.value.lineno}: {node.arg}"
        if isinstance(node, ast.Constant) and node.value in BANNED_ARGUMENTS:
            yield f"{path.relative_to(ROOT)}:{node.lineno}: {node.value!r}"


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


# Whoever can write what these read runs code here: half of all advisories on servers like this one.
BANNED_MODULES = {
    "pickle",
    "_pickle",
    "cPickle",
    "cloudpickle",
    "dill",
    "joblib",
    "marshal",
    "shelve",
    "runpy",
}
BANNED_CALLS = {
    *("eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec", "builtins.compile"),
    *("torch.load", "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter"),
    *("yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all", "yaml.unsafe_load_all"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("asyncio.create_subprocess_shell", "jinja2.Environment", "jinja2.Template"),
    *("jinja2.sandbox.SandboxedEnvironment", "jinja2.nativetypes.NativeEnvironment"),
}
BANNED_ARGUMENTS = {"trust_remote_code", "allow_pickle"}


def _runs_what_it_reads(name):
    last = name.rpartition(".")[2]
    if name.split(".")[0] in BANNED_MODULES or name in BANNED_CALLS:
        return True
    # Collectives on objects pickle: send_object_list, all_gather_object and so on.
    return (
        re.fullmatch(r"(all_)?(broadcast|gather|reduce|recv|scatter|send)_object|.*_object_list", last)
        is not None
    )


def _is_banned_argument(keyword):
    is_shell = keyword.arg == "shell" and not (
        isinstance(keyword.value, ast.Constant) and keyword.value.value is False
    )
    is_unsafe = keyword.arg == "weights_only" and ast.unparse(keyword.value) != "True"
    return keyword.arg in BANNED_ARGUMENTS or is_shell or is_unsafe


def _is_banned(name, inside):
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


BAD_LINES = """
import dill
from shelve import open
import torch, _pickle
from torch import load
from yaml import unsafe_load
torch.load(f, weights_only=True)
f(weights_only=False)
dist.broadcast_object_list(x)
from torch.distributed import all_gather_object
group.send_object_list([])
yaml.load(text)
compile(text, 'f', 'exec')
__import__('x')
subprocess.run(c, shell=True)
run(c, shell=flag)
os.popen(c)
f(trust_remote_code=False)
f(**{'trust_remote_code': True})
np.load(f, allow_pickle=True)
jinja2.Template(text)
asyncio.create_subprocess_shell(c)
from jinja2 import Environment
"""

GOOD_LINES = """
re.compile(p)
model.eval()
subprocess.run(c)
run(c, shell=False)
yaml.safe_load(t)
_json_object(value)
"""


@pytest.mark.parametrize("line", BAD_LINES.strip().splitlines())
def test_no_way_to_run_what_comes_from_outside_is_overlooked(line, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "engine.py"
    path.write_text(line)
    assert list(banned(path))
    path.write_text(GOOD_LINES)
    assert list(banned(path)) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_forbidden(path):
    assert list(banned(path)) == []


HARMLESS_CALLS = {
    "bool",
    *(
        "all",
        "any",
        "dict",
        "float",
        "getattr",
        "int",
        "isinstance",
        "len",
        "list",
        "map",
        "max",
        "min",
        "range",
    ),
    *(
        "set",
        "sorted",
        "str",
        "sum",
        "tuple",
        "zip",
        "block_bytes",
        "num_blocks_of",
        "cell_bytes",
        "self.load",
    ),
}
HARMLESS_METHODS = {
    "locked",
    "is_alive",
    *("all", "any", "data_ptr", "items", "owns"),
    *("blocks_for", "count", "endswith", "is_closed", "is_contiguous", "keys", "kept", "numel", "ref_count"),
    *("startswith", "status", "stride", "values", "is_running", "get"),
}


def impure_asserts(path):
    """Asserts that do something, which `python -O` would leave out."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Assert):
            for part in ast.walk(node.test):
                if isinstance(part, (ast.NamedExpr, ast.Await)) or not _is_harmless(part):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(part)}"


def _is_harmless(node):
    if not isinstance(node, ast.Call):
        return True
    name = ast.unparse(node.func)
    return name in HARMLESS_CALLS or (
        isinstance(node.func, ast.Attribute) and node.func.attr in HARMLESS_METHODS
    )


def test_asserts_do_nothing_that_optimized_python_leaves_out(tmp_path, monkeypatch):
    """Files of tests are no matter: pytest runs their asserts in any case, but not those of helpers."""
    helpers = [path for path in (ROOT / "tests").rglob("*.py") if not path.name.startswith("test_")]
    assert [found for path in (*SOURCES, *helpers) for found in impure_asserts(path)] == []
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "bad.py"
    path.write_text("assert queue.pop()\nassert (x := f(y))\nassert len(x) == 2\nassert await g()\n")
    assert {int(found.split(":")[1]) for found in impure_asserts(path)} == {1, 2, 4}
