"""Lines of code by folder, and what has grown too large: `python tools/sizes.py`.

Exit code 1 if a file is over its limit. Generated stubs are not counted.
"""

import ast
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (
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
    "compose",
    "tests",
    "tools",
    "benchmarks",
)
MAX_FILE_LINES = 400
MAX_TEST_FILE_LINES = 600
MAX_FUNCTION_LINES = 60
NUM_LARGEST = 8


def sources() -> list[Path]:
    """Every Python file that a person wrote."""
    found = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in found if "_pb2" not in path.name]


def functions(path: Path) -> list[tuple[int, str]]:
    """(lines, place) of every function in a file."""
    nodes = ast.walk(ast.parse(path.read_text()))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [
        (
            (node.end_lineno or node.lineno) - node.lineno + 1,
            f"{path.relative_to(ROOT)}:{node.lineno} {node.name}",
        )
        for node in nodes
        if isinstance(node, kinds)
    ]


def limit(path: Path) -> int:
    """Most lines that a file may have."""
    return MAX_TEST_FILE_LINES if path.is_relative_to(ROOT / "tests") else MAX_FILE_LINES


def main() -> int:
    """Print the tables; returns the exit code."""
    lines = {path: len(path.read_text().splitlines()) for path in sources()}
    by_folder: dict[str, list[int]] = defaultdict(list)
    for path, count in lines.items():
        by_folder[path.relative_to(ROOT).parts[0]].append(count)
    for folder, counts in by_folder.items():
        print(f"{folder:12} {len(counts):4} files {sum(counts):6} lines, largest {max(counts)}")
    product = [
        path for path in lines if path.relative_to(ROOT).parts[0] not in ("tests", "tools", "benchmarks")
    ]
    print(f"{'product':12} {len(product):4} files {sum(lines[path] for path in product):6} lines")
    longest = sorted((found for path in product for found in functions(path)), reverse=True)
    print("\nlongest functions")
    for count, place in longest[:NUM_LARGEST]:
        print(f"{count:5} {place}")
    wrong = [
        f"{path.relative_to(ROOT)}: {lines[path]} lines, at most {limit(path)}"
        for path in lines
        if lines[path] > limit(path)
    ]
    wrong += [
        f"{place}: {count} lines, at most {MAX_FUNCTION_LINES}"
        for count, place in longest
        if count > MAX_FUNCTION_LINES
    ]
    if wrong:
        print("\ntoo large\n" + "\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
