import pytest

from runtime.checkpoint_dir import bundled_model
from runtime.errors import StartupError
from worker.speculative import parse_speculative


def test_auto_takes_the_draft_inside_the_checkpoint(tmp_path):
    model = bundled_model()
    assert parse_speculative("auto", model) == ("draft", model / "draft")
    assert parse_speculative("draft", model) == ("draft", model / "draft")
    assert parse_speculative("auto", tmp_path) == ("off", None)


def test_proposers_by_name(tmp_path):
    assert parse_speculative("off", bundled_model()) == ("off", None)
    assert parse_speculative("ngram", bundled_model()) == ("ngram", None)
    assert parse_speculative(f"draft:{tmp_path}", bundled_model()) == ("draft", tmp_path.resolve())


@pytest.mark.parametrize("value", ["eagle", "draft:", "ngram:3", "", "draft:/no/such/directory"])
def test_anything_else_names_the_flag_or_the_directory(value, tmp_path):
    with pytest.raises(StartupError):
        parse_speculative(value, tmp_path)
