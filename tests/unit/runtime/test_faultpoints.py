"""Fault points, armed and not. The crash itself is in tests/e2e/test_crash_points.py."""

import os
import threading
from pathlib import Path

import pytest

from runtime import faultpoints


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(faultpoints, "_folder", tmp_path)
    return tmp_path


def test_points_are_off_unless_the_environment_names_a_folder() -> None:
    assert (faultpoints.VARIABLE in os.environ) == faultpoints.ACTIVE


def test_an_unarmed_point_does_nothing(folder: Path) -> None:
    faultpoints.reach("decode.step")
    assert list(folder.iterdir()) == []


def test_slow_is_done_on_each_pass_and_noted(folder: Path) -> None:
    (folder / "decode.step").write_text("slow 0.001")
    for _ in range(3):
        faultpoints.reach("decode.step")
    faultpoints.reach("prefill.step")
    assert (folder / "decode.step.hits").read_text() == f"{os.getpid()}\n" * 3


def test_a_hang_is_taken_once_and_ends_when_the_test_says_so(folder: Path) -> None:
    (folder / "decode.step").write_text("hang")
    thread = threading.Thread(target=faultpoints.reach, args=("decode.step",))
    thread.start()
    taken = folder / f"decode.step.{os.getpid()}"
    while not (folder / "decode.step.hits").exists():
        pass
    faultpoints.reach("decode.step")
    assert thread.is_alive()
    taken.unlink()
    thread.join(5)
    assert not thread.is_alive()
