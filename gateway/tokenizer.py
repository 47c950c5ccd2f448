"""Text to token ids, so that only a template can write control tokens.

A user's text that spells a special token ("<|eos|>") stays plain text. A chat template's own special tokens
must work, though, and after rendering both look alike. So before rendering, `protect` replaces the special
spellings in the user's strings by marks with a random nonce; the template sees everything else unchanged
(its trims, splits and tests work). After rendering, what still spells a special token was written by the
template; the marks turn back into plain text. If the user spelled none, which is nearly always, the rendered
text is encoded in one piece exactly as Hugging Face does.
"""

import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from gateway.detokenizer import Vocabulary
from runtime.errors import CheckpointError


class Shield:
    """Marks that stand for special spellings in the user's strings of one chat."""

    def __init__(self, special: re.Pattern[str] | None) -> None:
        self._special = special
        self._open = f"\ue000{secrets.token_hex(8)}:"
        self._spellings: list[str] = []

    @property
    def used(self) -> bool:
        """Whether any string contained a special spelling."""
        return bool(self._spellings)

    def protect(self, text: str) -> str:
        """The text with its special spellings replaced by marks."""
        return self._special.sub(self._mark, text) if self._special else text

    def reveal(self, text: str) -> str:
        """The text with its marks replaced by what they stand for."""
        return re.sub(
            re.escape(self._open) + "([0-9]+)\ue001", lambda match: self._spellings[int(match[1])], text
        )

    def _mark(self, match: re.Match[str]) -> str:
        self._spellings.append(match[0])
        return f"{self._open}{len(self._spellings) - 1}\ue001"


class TextTokenizer:
    """A checkpoint's tokenizer.json. Thread-safe: nothing changes after construction."""

    def __init__(self, serialized: str) -> None:
        # Two copies, because whether special spellings are recognised is a property of the object.
        self._plain = Tokenizer.from_str(serialized)
        self._control = Tokenizer.from_str(serialized)
        for tokenizer in (self._plain, self._control):
            tokenizer.no_truncation()
            tokenizer.no_padding()
        self._plain.encode_special_tokens = True
        self.vocabulary = Vocabulary(self._control)
        added: dict[int, Any] = self._control.get_added_tokens_decoder()
        self._special = {token.content: token for token in added.values() if token.special}
        self._special_ids = {token.content: token_id for token_id, token in added.items()}
        spellings = sorted(self._special, key=len, reverse=True)
        # A normalizer may shorten text, but NFKC's worst case is well below this factor.
        shrinks = 1 if self._control.normalizer is None else 18
        self._max_token_chars = shrinks * max(map(len, self._control.get_vocab(with_added_tokens=True)))
        self._pattern = re.compile("|".join(map(re.escape, spellings))) if spellings else None

    @classmethod
    def load(cls, path: Path) -> "TextTokenizer":
        """The tokenizer of a checkpoint directory; CheckpointError if it is missing or broken."""
        file = path / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(str(file), None, "no such file; a fast tokenizer is needed")
        try:
            return cls(file.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exception for a broken file
            raise CheckpointError(str(file), None, f"not a tokenizer ({error})") from error

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return 1 + max(self._control.get_vocab(with_added_tokens=True).values())

    def encode_text(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a user's text; the tokenizer's own special tokens (bos, eos) around it if asked."""
        return _encode(self._plain, text, add_special_tokens=add_special_tokens)

    def max_chars(self, num_tokens: int) -> int:
        """A text with more characters than this cannot have as few as `num_tokens` tokens."""
        return num_tokens * self._max_token_chars

    def shield(self) -> Shield:
        """Protection for the strings of one chat."""
        return Shield(self._pattern)

    def encode_rendered(self, rendered: str, shield: Shield) -> list[int]:
        """Ids of a rendered chat template whose user strings went through `shield.protect`."""
        if not shield.used or self._pattern is None:
            return _encode(self._control, rendered, add_special_tokens=False)
        return self._encode_pieces(rendered, self._pattern, shield)

    def _encode_pieces(self, rendered: str, pattern: re.Pattern[str], shield: Shield) -> list[int]:
        ids: list[int] = []
        start = 0
        strip_left = False
        for match in [*pattern.finditer(rendered), None]:
            token = self._special[match[0]] if match else None
            piece = rendered[start : match.start() if match else len(rendered)]
            piece = piece.lstrip() if strip_left else piece
            piece = piece.rstrip() if token and token.lstrip else piece
            ids += self.encode_text(shield.reveal(piece), add_special_tokens=False) if piece else []
            if match and token:
                ids.append(self._special_ids[match[0]])
                start, strip_left = match.end(), token.rstrip
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the ids; special tokens are not shown."""
        text: str = self._control.decode(list(token_ids), skip_special_tokens=True)
        return text

    def token_text(self, token_id: int) -> tuple[str, bytes]:
        """(text, bytes) of one token for log-probabilities; part of a character shows as U+FFFD."""
        raw = self.vocabulary.token_bytes(token_id)
        return raw.decode("utf-8", "replace"), raw


def _encode(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    """Ids of one text; a batch of one, because only batches let go of the interpreter lock."""
    ids: list[int] = tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
    return ids
