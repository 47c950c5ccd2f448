"""The committed stubs are those of the committed .proto files."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def test_stubs_are_fresh(tmp_path):
    spec = importlib.util.spec_from_file_location("generate_stubs", ROOT / "tools" / "generate_stubs.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    written = {path.name: path.read_text() for path in tool.generate(tmp_path)}
    committed = {path.name: path.read_text() for path in (ROOT / "protos/tandem/v1").glob("*_pb2*.py*")}
    assert written.keys() == committed.keys()
    stale = [name for name, text in written.items() if committed[name] != text]
    assert stale == [], "run `make protos`"
