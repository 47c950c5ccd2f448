"""A directory, a hub id in the local cache, or one line that says what was looked for."""

from pathlib import Path

import pytest
from huggingface_hub import constants

from runtime.checkpoint_dir import bundled_model, file_hash, resolve
from runtime.errors import StartupError


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An offline hub with one model in its cache."""
    snapshot = tmp_path / "models--acme--tiny" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = tmp_path / "models--acme--tiny" / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return snapshot


def test_a_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    assert resolve(str(tmp_path), weights=True) == tmp_path.resolve()
    assert (bundled_model() / "config.json").is_file()


def test_a_hub_id_comes_from_the_cache(hub_cache: Path) -> None:
    assert resolve("acme/tiny", weights=False).resolve() == hub_cache.resolve()


@pytest.mark.parametrize("name", ["acme/absent", "/no/such/directory", "./neither", "a/b/c", "../up"])
def test_what_is_not_there_is_one_line(hub_cache: Path, name: str) -> None:
    with pytest.raises(StartupError, match=f"--model {name}: no such directory") as caught:
        resolve(name, weights=True)
    assert "\n" not in caught.value.message


def test_the_hash_of_a_missing_file_is_that_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert file_hash(tmp_path / "absent") == file_hash(tmp_path / "empty")
    (tmp_path / "full").write_text("x")
    assert file_hash(tmp_path / "full") != file_hash(tmp_path / "empty")
