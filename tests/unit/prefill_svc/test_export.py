"""Which blocks and layers travel when, and the one commit at the end."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvtransfer.layout import KvFacts, KvGroup, layer_block_bytes, num_blocks_of
from kvtransfer.messages import FirstToken
from kvtransfer.plan import Coverage, rectangles
from prefill_svc.export import Export
from prefill_svc.written import NOTHING, Stretch, Written, stretches
from worker.attach import AttemptKey

TOKEN = FirstToken(choice=0, token_id=5)
LAST = FirstToken(choice=0, token_id=5, finish_reason=1)
LAYERS = (3, 1)
"""Of the target and of a draft."""


def export(num_tokens: int, block_size: int = 16) -> Export:
    return Export(
        key=AttemptKey(0, 1, 1), transfer_id=bytes(16), num_tokens=num_tokens, block_size=block_size
    )


def whole(blocks: range) -> list[Stretch]:
    return [Stretch(group, blocks, range(count)) for group, count in enumerate(LAYERS)]


@pytest.mark.parametrize(("num_tokens", "blocks"), [(1, 1), (16, 1), (17, 2), (100, 7)])
def test_a_prompt_in_one_chunk(num_tokens: int, blocks: int) -> None:
    item = export(num_tokens)
    item.advance((tuple(range(blocks)),), num_tokens)
    assert item.take(LAYERS) == whole(range(blocks))
    assert not item.take(LAYERS)


def test_a_partly_filled_block_waits_for_its_chunk() -> None:
    item = export(50)
    taken = []
    for computed in (10, 20, 47, 48, 50):
        item.advance(((9, 8, 7, 6),), computed)
        taken.append([list(stretch.blocks) for stretch in item.take((1,))])
    assert taken == [[], [[0]], [[1]], [[2]], [[3]]]


def test_layers_of_a_running_step_go_first_and_the_draft_follows_at_its_end() -> None:
    item, tables = export(50), ((9, 8, 7, 6),)
    item.advance(tables, 16)
    item.advance_layers(tables, 40, 1)
    assert item.take(LAYERS) == [
        Stretch(0, range(1), range(3)),
        Stretch(0, range(1, 2), range(1)),
        Stretch(1, range(1), range(1)),
    ]
    item.advance_layers(tables, 40, 3)
    assert item.take(LAYERS) == [Stretch(0, range(1, 2), range(1, 3))]
    item.advance(tables, 40)
    assert item.take(LAYERS) == [Stretch(1, range(1, 2), range(1))]


def test_commit_comes_once_and_after_the_last_block() -> None:
    item = export(20)
    item.first_tokens = (TOKEN,)
    item.advance(((1, 2),), 20)
    assert item.take_commit() is None
    item.take(LAYERS)
    assert item.take_commit() == (TOKEN,)
    assert item.take_commit() is None


def test_all_layers_of_a_step_that_does_not_end_are_no_commit() -> None:
    item = export(20)
    item.advance_layers(((1, 2),), 20, LAYERS[0])
    item.take(LAYERS)
    assert item.has_taken
    assert item.take_commit() is None
    item.first_tokens = (TOKEN,)
    assert item.take_commit() is None


def test_a_finished_request_commits_without_its_blocks() -> None:
    item = export(20)
    item.first_tokens = (LAST,)
    assert item.take_commit() == (LAST,)


def test_one_choice_that_goes_on_needs_all_blocks() -> None:
    item = export(20)
    item.first_tokens = (LAST, FirstToken(choice=1, token_id=6))
    assert item.take_commit() is None
    item.advance(((1, 2),), 20)
    item.take(LAYERS)
    assert item.take_commit() == (LAST, FirstToken(choice=1, token_id=6))


def cells(written: Written) -> set[tuple[int, int, int]]:
    """(group, block, layer) of every written cell, counted one by one."""
    full = {(g, b, layer) for g, n in enumerate(LAYERS) for b in range(written.blocks) for layer in range(n)}
    return full | {(0, b, layer) for b in range(written.ahead) for layer in range(written.layers)}


@given(*(st.builds(Written, st.integers(0, 6), st.integers(0, 6), st.integers(0, 3)) for _ in range(2)))
def test_stretches_are_what_one_state_has_above_another(before: Written, after: Written) -> None:
    if not cells(before) <= cells(after):
        with pytest.raises(AssertionError, match="taken back"):
            stretches(before, after, LAYERS)
        return
    found = [(s.group, b, n) for s in stretches(before, after, LAYERS) for b in s.blocks for n in s.layers]
    assert len(found) == len(set(found))
    assert set(found) == cells(after) - cells(before)


class Exporting(RuleBasedStateMachine):
    """Chunks of any length, told of layer by layer or not, and a link that takes when it likes."""

    BLOCK_SIZE = 4
    GROUPS = tuple(
        KvGroup(name=str(n), num_layers=n, num_kv_heads=1, head_dim=2, dtype="float32") for n in LAYERS
    )
    FACTS = KvFacts(
        protocol_major=1, model_hash="", tokenizer_hash="", block_size=BLOCK_SIZE, max_model_len=99,
        rope="", groups=GROUPS,
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.item = export(33, self.BLOCK_SIZE)
        self.tables = (tuple(range(9)),) * 2
        self.computed = self.layers = 0
        self.step_end: int | None = None
        self.coverage = Coverage(self.FACTS, 0, num_blocks_of(33, self.BLOCK_SIZE))

    @precondition(lambda self: self.step_end is None and self.computed < 33)
    @rule(num_tokens=st.integers(1, 33))
    def begin_step(self, num_tokens: int) -> None:
        self.step_end, self.layers = min(self.computed + num_tokens, 33), 0

    @precondition(lambda self: self.step_end is not None and self.layers < LAYERS[0])
    @rule(num_layers=st.integers(1, LAYERS[0]))
    def pass_layers(self, num_layers: int) -> None:
        self.layers = min(self.layers + num_layers, LAYERS[0])
        self.item.advance_layers(self.tables, self.step_end, self.layers)

    @precondition(lambda self: self.step_end is not None)
    @rule()
    def end_step(self) -> None:
        self.computed, self.step_end = self.step_end, None
        self.item.advance(self.tables, self.computed)
        if self.computed == 33:
            self.item.first_tokens = (TOKEN,)

    @rule(slab_cells=st.integers(1, 7))
    def take(self, slab_cells: int) -> None:
        for group, blocks, layers in self.item.take(LAYERS):
            slab_bytes = slab_cells * layer_block_bytes(self.GROUPS[group], self.BLOCK_SIZE)
            for piece in rectangles(self.FACTS, group, blocks.start, len(blocks), slab_bytes, layers):
                assert piece.num_blocks * piece.num_layers <= slab_cells
                assert self.coverage.fault(piece) is None
                assert self.is_written(group, piece.first_block + piece.num_blocks, layers.stop)
                self.coverage.add(piece)

    def is_written(self, group: int, end: int, num_layers: int) -> bool:
        """By what the steps did, not by what the export says."""
        if min(end * self.BLOCK_SIZE, 33) <= self.computed:
            return True
        in_step = self.step_end is not None and min(end * self.BLOCK_SIZE, 33) <= self.step_end
        return in_step and group == 0 and num_layers <= self.layers

    @invariant()
    def a_commit_has_everything(self) -> None:
        if self.item.take_commit() is not None:
            assert self.coverage.complete
            assert self.computed == 33
        self.item.check()


TestExporting = Exporting.TestCase
TestExporting.settings = settings(max_examples=30, stateful_step_count=30)


def test_nothing_is_less_than_anything() -> None:
    assert not stretches(NOTHING, NOTHING, LAYERS)
