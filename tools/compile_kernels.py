"""Compile every Triton kernel without a GPU: `python -m tools.compile_kernels [--quick] [NAME ...]`.

Writes registers, stack and shared memory of each kernel on each architecture to
benchmarks/results/kernels_aot.json. Exit code 1 if one has a stack, which is where ptxas spills registers,
unless its spec allows that; Triton's own error if one does not compile.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from tools.kernel_specs import KernelSpec, specs

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "kernels_aot.json"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED_MEMORY_BYTES = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Most that one program may have; what runs on sm_80 runs on sm_86, sm_89 and sm_120 too, which have less."""
ALIGNMENT = 16
"""Triton compiles a kernel of its own for pointers and integers that are multiples of this."""
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes."""

    name: str
    arch: int
    num_warps: int
    num_stages: int
    registers: int
    """Of each thread, of at most 255."""
    stack_bytes: int
    """Of each thread."""
    shared_bytes: int
    """Of each program."""


def compile_spec(spec: KernelSpec, arch: int) -> Usage:
    """Compile one kernel for one architecture; raises what Triton or ptxas raise."""
    launch = spec.launch
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    compiled = triton.compile(_source(spec), target=GPUTarget("cuda", arch, 32), options=options)
    registers, stack_bytes = _registers_and_stack(compiled)
    return Usage(
        name=spec.name,
        arch=arch,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        registers=registers,
        stack_bytes=stack_bytes,
        shared_bytes=compiled.metadata.shared,
    )


def _source(spec: KernelSpec) -> ASTSource:
    """The kernel as it would be compiled at its first launch with these arguments."""
    kernel, args, constants = spec.launch.kernel, spec.launch.args, dict(spec.launch.constexprs)
    assert args.keys() | constants.keys() == set(kernel.arg_names), spec.name
    special = {param.name for param in kernel.params if not param.do_not_specialize}
    ones = {name: value for name, value in args.items() if isinstance(value, int) and value == 1}
    constants |= {name: value for name, value in ones.items() if name in special}
    signature = {name: "constexpr" if name in constants else _type(args[name]) for name in kernel.arg_names}
    attributes = {
        (position,): [["tt.divisibility", ALIGNMENT]]
        for position, name in enumerate(kernel.arg_names)
        if name not in constants and name in special and _is_aligned(args[name])
    }
    return ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)


def _is_aligned(value: Tensor | float) -> bool:
    """Tensors are: torch's allocator and all our views keep to it."""
    return isinstance(value, Tensor) or (isinstance(value, int) and value % ALIGNMENT == 0)


def _type(value: Tensor | float) -> str:
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _registers_and_stack(compiled: CompiledKernel) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (re.search(rf"{word}:(\d+)", report) for word in ("REG", "STACK"))
    assert registers is not None, report
    assert stack is not None, report
    return int(registers[1]), int(stack[1])


def objections(spec: KernelSpec, usage: Usage) -> Iterable[str]:
    """What is wrong with a kernel that did compile."""
    place = f"{usage.name} sm_{usage.arch}"
    if usage.stack_bytes > spec.allowed_stack_bytes:
        yield f"{place}: {usage.stack_bytes} bytes of stack, at most {spec.allowed_stack_bytes}"
    if usage.shared_bytes > SHARED_MEMORY_BYTES[usage.arch]:
        yield f"{place}: {usage.shared_bytes} bytes of shared memory"


def compile_all(chosen: Iterable[KernelSpec]) -> tuple[list[Usage], list[str]]:
    """(usage of each kernel on each architecture, what is wrong)."""
    usages, wrong = [], []
    for spec in chosen:
        for arch in spec.archs:
            usage = compile_spec(spec, arch)
            print(
                f"{usage.name:44} sm_{arch:<4} {usage.registers:4} registers {usage.stack_bytes:5} B stack "
                f"{usage.shared_bytes:7} B shared",
                flush=True,
            )
            usages.append(usage)
            wrong += objections(spec, usage)
    return usages, wrong


def first_of_each_kernel(chosen: Iterable[KernelSpec]) -> list[KernelSpec]:
    """The specs of one name for each function."""
    every = list(chosen)
    names: dict[str, str] = {}
    for spec in every:
        names.setdefault(spec.launch.kernel.__name__, spec.name)
    return [spec for spec in every if spec.name in names.values()]


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", help="only kernels whose name starts so; writes no file")
    parser.add_argument("--quick", action="store_true", help="one spec of each kernel; writes no file")
    parser.add_argument("--check", action="store_true", help="writes no file")
    options = parser.parse_args()
    prefixes = tuple(options.names)
    chosen = [spec for spec in specs() if not prefixes or spec.name.startswith(prefixes)]
    usages, wrong = compile_all(first_of_each_kernel(chosen) if options.quick else chosen)
    if not (options.check or options.quick or prefixes):
        table = {"triton": triton.__version__, "kernels": [asdict(usage) for usage in usages]}
        RESULTS.write_text(json.dumps(table, indent=1) + "\n")
    print(*wrong, sep="\n")
    return 1 if wrong or not usages else 0


if __name__ == "__main__":
    sys.exit(main())
