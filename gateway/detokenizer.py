"""Token ids to text, one token at a time.

Whatever the split, the deltas of a `Detokenizer` concatenate to exactly
`tokenizer.decode(token_ids, skip_special_tokens=True)`, with constant work per token:

- Byte-level vocabularies (GPT-2, Llama 3, Qwen): every token is a run of bytes, and an incremental UTF-8
  decoder holds back an unfinished character.
- All others (SentencePiece and its byte fallback): a token is decoded behind the token before it, so that
  the decoder's rules for a text's start apply once. A run of byte tokens is decoded when it ends, because
  one bad byte turns the whole run into replacement characters.
"""

import codecs
import json
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Protocol

from tokenizers import Tokenizer

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Detokenizer(Protocol):
    """Text of a growing sequence of token ids."""

    def push(self, token_id: int) -> str:
        """Text that this token completes; may be empty."""
        ...

    def finish(self) -> str:
        """Text of what was held back, at the end."""
        ...


@lru_cache(maxsize=1)
def byte_of_char() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (GPT-2's table, reversed)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + index): byte for index, byte in enumerate(others)}


def is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer's decoder is ByteLevel and nothing else."""
    decoder = json.loads(tokenizer.to_str())["decoder"] or {}
    parts = decoder.get("decoders", [decoder])
    return [part.get("type") for part in parts] == ["ByteLevel"]


class Vocabulary:
    """The bytes behind each token id of a tokenizer; shared by all requests."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.byte_level = is_byte_level(tokenizer)
        added = tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._shown_bytes: dict[int, bytes] = {}
        self._whole_texts: dict[int, str] = {}

    def shown_bytes(self, token_id: int) -> bytes:
        """Of a byte-level vocabulary: what the token adds to a text; b"" for special and unknown ids."""
        try:
            return self._shown_bytes[token_id]
        except KeyError:
            entry = self.spelling(token_id)
            raw = b"" if entry is None else spelled_bytes(entry)
            if entry is not None:  # so that the table is never larger than the vocabulary
                self._shown_bytes[token_id] = raw
                self._note_text(token_id, raw)
            return raw

    def _note_text(self, token_id: int, raw: bytes) -> None:
        try:
            self._whole_texts[token_id] = raw.decode()
        except UnicodeDecodeError:
            pass  # its text depends on its neighbours

    def whole_text(self, token_id: int) -> str | None:
        """The text of a token of whole characters; None for one with parts of characters, or unknown yet."""
        return self._whole_texts.get(token_id)

    def spelling(self, token_id: int) -> str | None:
        """The vocabulary's entry if the token shows in text; None for special and unknown ids."""
        if token_id in self._special_ids:
            return None
        entry: str | None = self.tokenizer.id_to_token(token_id)
        return entry

    def token_bytes(self, token_id: int) -> bytes:
        """What this token alone adds to a text, special tokens by their name; b"" for unknown ids."""
        entry: str | None = self.tokenizer.id_to_token(token_id)
        if entry is None:
            return b""
        if token_id in self._special_ids:
            return entry.encode()
        if self.byte_level:
            return spelled_bytes(entry)
        if match := BYTE_TOKEN.fullmatch(entry):
            return bytes([int(match[1], 16)])
        return entry.replace("\u2581", " ").encode()

    def detokenizer(self) -> Detokenizer:
        """A fresh detokenizer for one choice."""
        return ByteLevelDetokenizer(self) if self.byte_level else WindowDetokenizer(self)


def spelled_bytes(entry: str) -> bytes:
    """Bytes of a byte-level entry; an entry outside the byte alphabet stands for itself."""
    table = byte_of_char()
    try:
        return bytes(table[char] for char in entry)
    except KeyError:
        return entry.encode()


class ByteLevelDetokenizer:
    """For byte-level vocabularies: bytes in, whole characters out."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_inside = False
        """Of a character."""

    def push(self, token_id: int) -> str:
        """Text that this token completes."""
        if not self._is_inside:
            whole = self._vocabulary.whole_text(token_id)
            if whole is not None:
                return whole
        text = self._utf8.decode(self._vocabulary.shown_bytes(token_id))
        self._is_inside = bool(self._utf8.getstate()[0])
        return text

    def finish(self) -> str:
        """A replacement character if a character is left unfinished."""
        self._is_inside = False
        return self._utf8.decode(b"", final=True)


class WindowDetokenizer:
    """For every other decoder: decodes behind an anchor, the last token whose text is out."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        # Never a byte token: one would join the run behind it.
        self._anchor: list[int] = []
        # A byte run, and the token that ends it.
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """Text of the token, and of the byte run that it ends."""
        entry = self._vocabulary.spelling(token_id)
        if entry is None:
            return ""
        self._pending.append(token_id)
        if BYTE_TOKEN.fullmatch(entry):
            return ""
        text = self.finish()
        self._anchor = [token_id]
        return text

    def finish(self) -> str:
        """Text of the byte run, if one is open."""
        if not self._pending:
            return ""
        decode = self._vocabulary.tokenizer.decode
        before: str = decode(self._anchor) if self._anchor else ""
        after: str = decode(self._anchor + self._pending)
        self._pending = []
        return after[len(before) :]


class StopStrings:
    """Finds the first stop string in a growing text and holds back what could become one.

    One Knuth-Morris-Pratt automaton per string: constant work per character. The match that ends first
    wins; of several with the same end, the longest.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        self._failure = [_failure_table(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that is safe to show, the stop string found or None).

        The text ends before the stop string; after a match nothing more may be pushed.
        """
        if not self._stops:
            return text, None
        buffer = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            stop = self._advance(char)
            if stop is not None:
                self._held = ""
                return buffer[: end - len(stop)], stop
        num_held = max(self._matched)
        self._held = buffer[len(buffer) - num_held :]
        return buffer[: len(buffer) - num_held], None

    def finish(self) -> str:
        """What was held back, now that nothing follows."""
        held, self._held = self._held, ""
        return held

    def _advance(self, char: str) -> str | None:
        found: str | None = None
        for index, stop in enumerate(self._stops):
            matched = self._matched[index]
            while matched and stop[matched] != char:
                matched = self._failure[index][matched - 1]
            matched += stop[matched] == char
            self._matched[index] = matched
            if matched == len(stop) and (found is None or len(stop) > len(found)):
                found = stop
        return found

    def check(self) -> None:
        """What is held is exactly the longest suffix that begins a stop string."""
        assert len(self._held) == max(self._matched, default=0)
        for stop, matched in zip(self._stops, self._matched, strict=True):
            assert matched < len(stop)
            assert self._held.endswith(stop[:matched])


def _failure_table(stop: str) -> list[int]:
    table = [0] * len(stop)
    length = 0
    for index in range(1, len(stop)):
        while length and stop[length] != stop[index]:
            length = table[length - 1]
        length += stop[length] == stop[index]
        table[index] = length
    return table
