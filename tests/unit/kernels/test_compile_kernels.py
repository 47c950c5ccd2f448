"""Every Triton kernel compiles for GPUs that are not here."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from tools.compile_kernels import RESULTS, ROOT
from tools.kernel_specs import specs


def compile_kernels(*arguments):
    """In a process of its own: kernels that were defined for the interpreter cannot be compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tools.compile_kernels", *arguments],
        env=environment | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def names():
    return sorted(f"{spec.name} sm_{arch}" for spec in specs() for arch in spec.archs)


def test_names_are_distinct():
    assert [name for name, count in Counter(names()).items() if count > 1] == []


def test_the_table_has_every_kernel():
    """Otherwise run `make kernels-aot`."""
    table = json.loads(RESULTS.read_text())
    assert sorted(f"{usage['name']} sm_{usage['arch']}" for usage in table["kernels"]) == names()


def test_one_of_each_kernel_compiles():
    lines = compile_kernels("--quick").splitlines()
    kernels = {spec.launch.kernel.__name__ for spec in specs()}
    assert len(lines) >= len(kernels)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_every_kernel_compiles_without_spills():
    compile_kernels("--check")
