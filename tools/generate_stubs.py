"""Generate the Python stubs of protos/ in place: `make protos`.

protoc writes `from tandem.v1 import …`, which would import from the tandem package; the one import
form is rewritten to `from protos.tandem.v1 import …`.
"""

import re
import sys
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
IMPORT = re.compile(r"^from tandem\.v1 import", re.MULTILINE)


def generate(out: Path) -> list[Path]:
    """Write the stubs of every .proto file below `out`; returns the written files."""
    sources = sorted(str(p) for p in (ROOT / "protos" / "tandem" / "v1").glob("*.proto"))
    arguments = ["protoc", f"-I{ROOT / 'protos'}", f"-I{files('grpc_tools') / '_proto'}"]
    arguments += [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
    if protoc.main(arguments + sources) != 0:
        sys.exit("protoc failed")
    (out / "tandem" / "v1" / "common_pb2_grpc.py").unlink()  # common.proto has no service
    written = sorted((out / "tandem" / "v1").glob("*_pb2*.py*"))
    for path in written:
        path.write_text(IMPORT.sub("from protos.tandem.v1 import", path.read_text()))
    return written


if __name__ == "__main__":
    for stub in generate(ROOT / "protos"):
        print(stub.relative_to(ROOT))
