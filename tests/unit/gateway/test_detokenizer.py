"""Deltas concatenate to the library's own decode, whatever the tokens."""

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from gateway.detokenizer import StopStrings, Vocabulary, is_byte_level
from gateway.tokenizer import TextTokenizer
from runtime.checkpoint_dir import bundled_model

FEW = settings(max_examples=60, deadline=None, derandomize=True, database=None)

# One letter of each kind of UTF-8 length and plane, joiners, variation selectors, a tag, the last code point.
LETTERS = "aé߿ࠀ世\uffff\U00010000😀🏽\u200d\ufe0f𝔘𠀀\U000e0041\U0010ffff\n \ufffd"
TEXT = st.text(st.one_of(st.sampled_from(LETTERS), st.characters(exclude_categories=["Cs"])), max_size=12)


@functools.cache
def demo() -> TextTokenizer:
    return TextTokenizer.load(bundled_model())


@functools.cache
def sentencepiece(kind: str) -> Tokenizer:
    """A byte-fallback tokenizer: 0 unknown, 1 special, 2-257 bytes, then pieces."""
    pieces = ["▁", "▁a", "a", "b", "▁b", "\ufffd", "é", "世"]
    vocabulary = {"<unk>": 0, "<s>": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    vocabulary |= {piece: 258 + index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.add_special_tokens(["<s>"])
    chain = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = {
        "llama": decoders.Sequence([*chain, decoders.Strip(" ", 1, 0)]),
        "gemma": decoders.Sequence(chain),
        "metaspace": decoders.Metaspace(),
    }[kind]
    return tokenizer


def incremental(vocabulary: Vocabulary, token_ids: list[int]) -> str:
    detokenizer = vocabulary.detokenizer()
    return "".join([detokenizer.push(token_id) for token_id in token_ids] + [detokenizer.finish()])


@FEW
@given(st.lists(st.integers(0, 4200), max_size=30))
def test_byte_level_any_ids(token_ids: list[int]) -> None:
    assert incremental(demo().vocabulary, token_ids) == demo().decode(token_ids)


@FEW
@given(TEXT, st.integers(0, 40))
def test_byte_level_text_cut_anywhere(text: str, cut: int) -> None:
    token_ids = demo().encode_text(text)[: cut or None]
    assert incremental(demo().vocabulary, token_ids) == demo().decode(token_ids)
    assert incremental(demo().vocabulary, demo().encode_text(text)) == text


@pytest.mark.parametrize("kind", ["llama", "gemma", "metaspace"])
def test_byte_fallback(kind: str) -> None:
    vocabulary = Vocabulary(sentencepiece(kind))
    pieces = st.lists(st.sampled_from([0, 1, *range(258, 266), 9999]), max_size=4)
    raw = st.one_of(TEXT.map(str.encode), st.binary(max_size=4)).map(lambda data: [2 + b for b in data])

    @FEW
    @given(st.lists(st.one_of(pieces, raw), max_size=6))
    def check(groups: list[list[int]]) -> None:
        token_ids = [token_id for group in groups for token_id in group]
        expected = vocabulary.tokenizer.decode(token_ids, skip_special_tokens=True)
        assert incremental(vocabulary, token_ids) == expected

    check()


def test_a_character_shows_as_soon_as_it_is_whole() -> None:
    detokenizer = demo().vocabulary.detokenizer()
    token_ids = demo().encode_text("😀", add_special_tokens=False)
    assert [detokenizer.push(token_id) for token_id in token_ids] == ["", "", "", "😀"]


def test_token_bytes_spell_the_text() -> None:
    token_ids = demo().encode_text("def é 世界 😀\n", add_special_tokens=False)
    assert b"".join(demo().vocabulary.token_bytes(i) for i in token_ids).decode() == "def é 世界 😀\n"
    llama = Vocabulary(sentencepiece("llama"))
    assert not is_byte_level(llama.tokenizer)
    assert [llama.token_bytes(i) for i in (2 + 0xC3, 259, 1, 9999)] == [b"\xc3", b" a", b"<s>", b""]


def first_stop(text: str, stops: list[str]) -> tuple[int, str] | None:
    """By definition: the match that ends first; of several, the longest. (start, stop)"""
    ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    return (min(ends)[0] - len(min(ends)[2]), min(ends)[2]) if ends else None


@settings(FEW, max_examples=80)
@given(
    st.lists(st.text("ab", max_size=5), max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_against_definition(deltas: list[str], stops: list[str]) -> None:
    finder = StopStrings(stops)
    shown, whole, found = "", "", None
    for delta in deltas:
        whole += delta
        safe, found = finder.push(delta)
        shown += safe
        if found is not None:
            break
        finder.check()
        assert whole.startswith(shown)
    expected = first_stop(whole, stops)
    if expected is None:
        assert found is None
        assert shown + finder.finish() == whole
    else:
        assert (shown, found) == (whole[: expected[0]], expected[1])


def test_no_stops_hold_nothing_back() -> None:
    assert StopStrings([]).push("abc") == ("abc", None)
