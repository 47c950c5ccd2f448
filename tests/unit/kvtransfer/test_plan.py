from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.layout import KvFacts, KvGroup, block_bytes, layer_block_bytes
from kvtransfer.plan import (
    SLAB_ALIGNMENT,
    Coverage,
    Rectangle,
    choose_slab_bytes,
    frame_sizes,
    rectangle_bytes,
    rectangles,
    size_index,
)

GROUP = KvGroup(name="target", num_layers=3, num_kv_heads=1, head_dim=2, dtype="float16")
FACTS = KvFacts(
    protocol_major=1,
    model_hash="",
    tokenizer_hash="",
    block_size=4,
    max_model_len=64,
    rope="",
    groups=(GROUP,),
)


def with_layers(num_layers: int) -> KvFacts:
    return replace(FACTS, groups=(replace(GROUP, num_layers=num_layers),))


def cells(rectangle: Rectangle) -> set[tuple[int, int]]:
    return {
        (rectangle.first_block + b, rectangle.first_layer + layer)
        for b in range(rectangle.num_blocks)
        for layer in range(rectangle.num_layers)
    }


@given(
    num_layers=st.integers(1, 40),
    cut=st.tuples(st.integers(0, 39), st.integers(1, 40)),
    first=st.integers(0, 50),
    count=st.integers(0, 60),
    spare=st.integers(0, 5000),
)
def test_rectangles_cover_every_cell_once_and_fit_the_slab(num_layers, cut, first, count, spare):
    facts = with_layers(num_layers)
    slab_bytes = layer_block_bytes(facts.groups[0], 4) + spare
    layers = range(num_layers)[cut[0] : cut[1]] or range(num_layers)
    pieces = rectangles(facts, 0, first, count, slab_bytes, layers)
    assert layers != range(num_layers) or pieces == rectangles(facts, 0, first, count, slab_bytes)
    covered = [cell for piece in pieces for cell in cells(piece)]
    assert len(covered) == len(set(covered))
    assert set(covered) == {(b, layer) for b in range(first, first + count) for layer in layers}
    assert all(rectangle_bytes(facts, piece) <= slab_bytes for piece in pieces)
    assert [p.first_block for p in pieces] == sorted(p.first_block for p in pieces)


def test_a_block_larger_than_a_slab_is_cut_into_nearly_equal_layer_ranges():
    facts = with_layers(10)
    pieces = rectangles(facts, 0, 5, 1, 4 * layer_block_bytes(facts.groups[0], 4))
    assert [(p.first_layer, p.num_layers) for p in pieces] == [(0, 4), (4, 4), (8, 2)]


def test_whole_blocks_share_a_slab():
    pieces = rectangles(FACTS, 0, 2, 5, 2 * block_bytes(GROUP, 4))
    assert [(p.first_block, p.num_blocks, p.num_layers) for p in pieces] == [(2, 2, 3), (4, 2, 3), (6, 1, 3)]


@given(payload=st.integers(0, 8192))
def test_the_smallest_frame_that_fits(payload):
    sizes = frame_sizes(8192)
    assert sizes == (8192, 2048, 512, 128)
    index = size_index(sizes, payload)
    assert sizes[index] >= payload
    assert index == len(sizes) - 1 or sizes[index + 1] < payload


@given(num_blocks=st.integers(1, 10000), limit=st.integers(1, 1 << 22))
def test_slabs_hold_a_cell_and_are_aligned(num_blocks, limit):
    slab_bytes = choose_slab_bytes(FACTS, num_blocks, limit)
    assert slab_bytes % SLAB_ALIGNMENT == 0
    assert slab_bytes >= layer_block_bytes(GROUP, 4)
    assert slab_bytes < max(limit, layer_block_bytes(GROUP, 4)) + SLAB_ALIGNMENT
    assert slab_bytes < num_blocks * block_bytes(GROUP, 4) + SLAB_ALIGNMENT


def test_clipping_drops_what_the_receiver_has():
    rectangle = Rectangle(0, 4, 4, 1, 2)
    assert rectangle.clipped(0) == rectangle
    assert rectangle.clipped(6) == Rectangle(0, 6, 2, 1, 2)
    assert rectangle.clipped(8) is None


@given(
    rects=st.lists(
        st.builds(
            Rectangle, st.just(0), st.integers(0, 8), st.integers(0, 5), st.integers(0, 4), st.integers(0, 4)
        ),
        max_size=12,
    )
)
def test_coverage_agrees_with_a_set_of_cells(rects):
    coverage, seen = Coverage(FACTS, 2, 7), set()
    everything = {(b, layer) for b in range(2, 7) for layer in range(3)}
    for rectangle in rects:
        wanted = cells(rectangle)
        good = bool(wanted) and wanted <= everything and not wanted & seen
        assert (coverage.fault(rectangle) is None) == good
        if good:
            coverage.add(rectangle)
            seen |= wanted
        assert coverage.complete == (seen == everything)


@pytest.mark.parametrize("group", [-1, 1])
def test_coverage_knows_its_groups(group):
    assert Coverage(FACTS, 0, 1).fault(Rectangle(group, 0, 1, 0, 1)) is not None
