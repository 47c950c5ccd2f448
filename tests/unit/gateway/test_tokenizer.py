"""Only a template writes control tokens."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from gateway.chat_template import MAX_SOURCE_CHARS, ChatTemplate, TemplateSource, load_chat_template
from gateway.prompts import bad_word_token_ids
from gateway.tokenizer import TextTokenizer
from runtime.checkpoint_dir import bundled_model
from runtime.errors import CheckpointError, InvalidRequest

DEMO = TextTokenizer.load(bundled_model())
SPECIALS = ["<|bos|>", "<|eos|>", "<|pad|>", "<|user|>"]
HOSTILE = st.lists(
    st.one_of(st.sampled_from([*SPECIALS, "<|eo", "s|>", " "]), st.text(max_size=3)), max_size=6
)
TEMPLATE = "{% for m in messages %}<|user|>{{ m['content'] | trim }}<|eos|>{% endfor %}"


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(HOSTILE)
def test_user_text_never_becomes_control_tokens(pieces: list[str]) -> None:
    text = "".join(pieces)
    token_ids = DEMO.encode_text(text, add_special_tokens=False)
    assert not set(token_ids) & set(range(6))
    assert DEMO.decode(token_ids) == text


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(HOSTILE)
def test_template_specials_work_and_content_stays_text(pieces: list[str]) -> None:
    content = "".join(pieces)
    shield = DEMO.shield()
    template = ChatTemplate(TEMPLATE, {}, origin="test")
    rendered = template.render([{"role": "user", "content": shield.protect(content)}])
    token_ids = DEMO.encode_rendered(rendered, shield)
    assert (token_ids[0], token_ids[-1]) == (3, 1)
    assert not set(token_ids[1:-1]) & set(range(6))
    assert DEMO.decode(token_ids) == content.strip()


def test_harmless_content_is_encoded_in_one_piece() -> None:
    shield = DEMO.shield()
    assert shield.protect("def f") == "def f"
    assert not shield.used
    control = Tokenizer.from_file(str(bundled_model() / "tokenizer.json"))
    rendered = "<|bos|># def f\n<|eos|>x"
    assert DEMO.encode_rendered(rendered, shield) == control.encode(rendered, add_special_tokens=False).ids


def test_strip_flags_of_added_tokens_hold_in_pieces() -> None:
    raw = Tokenizer.from_file(str(bundled_model() / "tokenizer.json"))
    raw.add_special_tokens([AddedToken("<|end|>", lstrip=True, rstrip=True)])
    tokenizer = TextTokenizer(raw.to_str())
    shield = tokenizer.shield()
    shield.protect("<|eos|>")
    assert (
        tokenizer.encode_rendered("a  <|end|>  b", shield)
        == raw.encode("a  <|end|>  b", add_special_tokens=False).ids
    )


def test_broken_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        TextTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a tokenizer"):
        TextTokenizer.load(tmp_path)


def render(source: str, **message: str) -> str:
    return ChatTemplate(source, {"bos_token": "B"}, origin="test").render([{"role": "user"} | message])


def test_template_environment() -> None:
    assert render("{{ bos_token }}{{ messages[0].role }}{{ add_generation_prompt }}") == "BuserTrue"
    assert render("{{ messages[0] | tojson }}", content="<é>") == '{"role": "user", "content": "<é>"}'
    assert render("{% for x in [1, 2, 3] %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}") == "1"
    assert render("  {% if true %}\nx\n  {% endif %}\ny") == "x\ny"
    assert len(render("{{ strftime_now('%Y') }}")) == 4


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no') }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ 1 / 0 }}",
        "{{ missing.field }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ 'x' * 100000 }}{% endfor %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ],
)
def test_template_failures_are_the_requests(source: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        render(source)
    assert raised.value.field == "messages"


def test_errors_quote_nobody_but_the_template() -> None:
    with pytest.raises(InvalidRequest, match="refuses these messages: no such role") as refused:
        render("{{ raise_exception('no such role') }}")
    assert "fails" not in refused.value.message
    for source in ("{{ messages[0]['content'] + 1 }}", "{{ {}[messages[0]['content']].x }}"):
        with pytest.raises(InvalidRequest, match=r"fails on these messages \([A-Za-z]+\)") as failed:
            render(source, content="canary")
        assert "canary" not in failed.value.message


def test_a_template_is_parsed_where_it_is_found_but_not_compiled() -> None:
    """Compiling would evaluate these."""
    for source in ("{{ 9**9**9 }}", "{{ 'x' * 10**12 }}", "{{ 'x'|center(10**12) }}"):
        TemplateSource(source=source, special_tokens={}, origin="test")
    for source in ("{% if %}", "{{ x", "{% for %}"):
        with pytest.raises(CheckpointError, match="valid Jinja"):
            TemplateSource(source=source, special_tokens={}, origin="test")
    with pytest.raises(CheckpointError, match="at most"):
        TemplateSource(source="x" * (MAX_SOURCE_CHARS + 1), special_tokens={}, origin="test")


def test_where_a_template_is_found(tmp_path: Path) -> None:
    assert load_chat_template(tmp_path, None) is None
    (tmp_path / "tokenizer_config.json").write_text(
        '{"chat_template": "config {{ eos_token }}", "eos_token": {"content": "E"}}'
    )
    found = load_chat_template(tmp_path, None)
    assert found is not None
    assert ChatTemplate(**vars(found)).render([]) == "config E"
    (tmp_path / "chat_template.jinja").write_text("file")
    found = load_chat_template(tmp_path, None)
    assert found is not None
    assert ChatTemplate(**vars(found)).render([]) == "file"
    with pytest.raises(CheckpointError):
        load_chat_template(tmp_path, str(tmp_path / "missing"))
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(CheckpointError, match="valid Jinja"):
        load_chat_template(tmp_path, None)


def test_bad_words_are_meant_with_and_without_a_space_before() -> None:
    sequences = bad_word_token_ids(DEMO, ["cat", " cat", "return"])
    assert [DEMO.decode(sequence) for sequence in sequences] == ["cat", " cat", "return", " return"]
