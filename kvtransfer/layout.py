"""What both ends of a link must agree on before a byte moves."""

from dataclasses import dataclass, fields, replace
from itertools import takewhile

from runtime.errors import Mismatch

DTYPE_BYTES = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int8": 1,
    "uint8": 1,
}
"""Bytes of one element, by torch's name of the dtype."""


@dataclass(frozen=True, kw_only=True)
class KvGroup:
    """One set of layers whose KV has one shape; it has its own block table."""

    name: str
    """For people: "target", "draft"."""
    num_layers: int
    """Layers in the group."""
    num_kv_heads: int
    """Key and value heads of the whole model, on all ranks together."""
    head_dim: int
    """Elements of one head."""
    dtype: str
    """Name of the torch dtype, a key of DTYPE_BYTES."""


@dataclass(frozen=True, kw_only=True)
class KvFacts:
    """All that shapes KV bytes or gives them meaning; equal on both ends of a link."""

    protocol_major: int
    """runtime.version.PROTOCOL_MAJOR."""
    model_hash: str
    """Of configuration and weights."""
    tokenizer_hash: str
    """Of the tokenizer's files."""
    block_size: int
    """Tokens in a block."""
    max_model_len: int
    """Longest context in tokens."""
    rope: str
    """Rotary embedding parameters as canonical JSON."""
    groups: tuple[KvGroup, ...]
    """In the order of FrameHeader.group. The first is the target's; others, as a draft's, are worth having
    but not needed."""

    def differences(self, other: "KvFacts") -> list[str]:
        """Each differing field that matters with both values, as in "block_size: 16 != 32"."""
        found = _field_differences(self, other, prefix="", skip="groups")
        if not self.groups or not other.groups:
            return [*found, f"groups: {len(self.groups)} != {len(other.groups)}"]
        return found + _field_differences(self.groups[0], other.groups[0], prefix="groups[0].")

    def num_common_groups(self, other: "KvFacts") -> int:
        """Leading groups that are equal on both sides; Mismatch naming every field that must not differ."""
        if found := self.differences(other):
            raise Mismatch("the two workers' KV caches do not fit: " + "; ".join(found))
        pairs = zip(self.groups, other.groups, strict=False)
        return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))

    def with_groups(self, num_groups: int) -> "KvFacts":
        """The same with the leading groups alone."""
        return replace(self, groups=self.groups[:num_groups])


def _field_differences(ours: object, theirs: object, *, prefix: str, skip: str = "") -> list[str]:
    names = [field.name for field in fields(ours) if field.name != skip]  # type: ignore[arg-type]
    pairs = [(name, getattr(ours, name), getattr(theirs, name)) for name in names]
    return [f"{prefix}{name}: {a} != {b}" for name, a, b in pairs if a != b]


def layer_block_bytes(group: KvGroup, block_size: int) -> int:
    """Bytes of one block in one layer: keys and values of `block_size` tokens."""
    return 2 * block_size * group.num_kv_heads * group.head_dim * DTYPE_BYTES[group.dtype]


def block_bytes(group: KvGroup, block_size: int) -> int:
    """Bytes of one block in all layers of the group."""
    return group.num_layers * layer_block_bytes(group, block_size)


def num_blocks_of(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens` tokens."""
    return -(-num_tokens // block_size)
