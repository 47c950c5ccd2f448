"""What is installed, and the least that pyproject.toml admits, has none of the holes that matter here."""

import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

SAFE = {
    "torch": "2.6",  # CVE-2025-32434
    "grpcio": "1.56.2",  # CVE-2023-33953 and before
    "starlette": "1.3.1",  # CVE-2026-48710, -48817, -54283
    "transformers": "5.10",  # CVE-2026-9856; of tests only
}
"""Library -> its first version without them."""

ROOT = Path(__file__).parents[2]


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    texts = [*project["dependencies"], *(text for extra in extras for text in extra)]
    return [Requirement(text) for text in texts]


@pytest.mark.parametrize("name", SAFE)
def test_the_installed_one_is_safe(name: str) -> None:
    assert Version(metadata.version(name)) >= Version(SAFE[name])


@pytest.mark.parametrize("name", SAFE)
def test_no_older_one_is_admitted(name: str) -> None:
    bounds = [spec for each in requirements() if each.name == name for spec in each.specifier]
    least = [Version(spec.version) for spec in bounds if spec.operator == ">="]
    assert least
    assert min(least) >= Version(SAFE[name])
