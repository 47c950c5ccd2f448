"""Decode steps over persistent buffers: padded, captured, replayed."""

import random
import weakref
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.batch import Span, pack
from engine.block_table import BlockTable
from engine.config import EngineConfig
from engine.drawing import Draw, draw_warped
from engine.engine import Engine
from engine.loader import load_model
from engine.request import Request, SamplingParams
from engine.step.decode_step import DecodeStep, DrawingStep
from engine.step.factory import step_shapes, steps_with
from engine.step.graphs import StepGraphs, Uncaptured, lent
from engine.step.inputs import StepInputs
from engine.step.shapes import MAX_STEP_ROWS, StepShape, StepShapes, usual_sizes, widths
from tests.unit.engine.step_tapes import Reruns, Tape, operators_of_a_gpu

BLOCK_SIZE, NUM_BLOCKS, MAX_LEN = 4, 64, 40


def random_spans(rng, num_seqs, width, free):
    """Requests somewhere in their sequences, each with 1 … width new tokens."""
    spans = []
    for _ in range(num_seqs):
        length = rng.randint(1, width)
        start = rng.randint(0, MAX_LEN - width)
        table = BlockTable(free.pop() for _ in range(-(-(start + length) // BLOCK_SIZE)))
        token_ids = [rng.randrange(3, 61) for _ in range(length)]
        spans.append(
            Span(table=table, start=start, token_ids=token_ids, num_singles=length - 1, samples=range(length))
        )
    return spans


def poisoned_pool(spans, seed):
    """Only what lies before the spans holds numbers."""
    generator = torch.Generator().manual_seed(seed)
    pool = torch.full((2, 2, NUM_BLOCKS, BLOCK_SIZE, 2, 8), torch.nan)
    for span in spans:
        for position in range(span.start):
            place = (span.table[position // BLOCK_SIZE], position % BLOCK_SIZE)
            pool[:, :, place[0], place[1]] = torch.randn(2, 2, 2, 8, generator=generator)
    return pool


def inputs_for(shapes, max_model_len=MAX_LEN):
    return StepInputs(
        max_num_seqs=shapes.max_num_seqs,
        max_num_rows=shapes.max_num_rows,
        max_model_len=max_model_len,
        block_size=BLOCK_SIZE,
        device=torch.device("cpu"),
    )


def graphs_over(module, pool, recorder, shapes, max_model_len=MAX_LEN):
    graphs = StepGraphs(DecodeStep(module, pool, inputs_for(shapes, max_model_len)), shapes, recorder)
    graphs.capture()
    return graphs


@torch.inference_mode()
def eagerly(model, pool, spans):
    """(hidden states, logits) of the packed batch without buffers."""
    batch = pack(spans, block_size=BLOCK_SIZE, device=torch.device("cpu"))
    hidden = model.module.forward(
        batch.token_ids, batch.positions, pool, batch.slot_mapping, batch.attention, batch.final
    )
    return hidden, model.module.logits(hidden)


def same_bits(one, other):
    return torch.equal(one.contiguous().view(torch.int32), other.contiguous().view(torch.int32))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("recorder", [Uncaptured, Reruns])
def test_padded_steps_have_the_bits_of_unpadded_ones_and_touch_nothing_else(tiny_model, seed, recorder):
    rng = random.Random(seed)
    shapes = StepShapes([1, 3, 8], [1, 3])
    pool = poisoned_pool([], seed)
    graphs = graphs_over(tiny_model.module, pool, recorder(), shapes)
    assert pool.isnan().all(), "a capture writes nowhere"
    for _ in range(4):
        free = rng.sample(range(NUM_BLOCKS), NUM_BLOCKS)
        width = rng.choice([1, 1, 2, 3])
        spans = random_spans(rng, rng.randint(1, min(8, 48 // (10 + width) + 2)), width, free)
        num_rows = sum(len(span.token_ids) for span in spans)
        shape = shapes.fit(len(spans), max(len(span.token_ids) for span in spans))
        before = poisoned_pool(spans, seed)
        pool.copy_(before)
        with torch.inference_mode():
            step = graphs.run(shape, spans)
        hidden, logits = eagerly(tiny_model, before, spans)
        assert not logits[:num_rows].isnan().any()
        assert same_bits(step.hidden[:num_rows], hidden[:num_rows])
        assert same_bits(step.logits[:num_rows], logits[:num_rows])
        assert same_bits(pool, before)


def test_a_replay_follows_the_buffers_alone(tiny_model):
    """With the operators of a GPU: the tape holds kernels and tensors, nothing of Python's is left."""
    rng, width = random.Random(2), 2
    pool = poisoned_pool([], 0)
    tape = Tape()
    with operators_of_a_gpu():
        graphs = graphs_over(tiny_model.module, pool, tape, StepShapes([4], [width]))
    assert pool.isnan().all()
    for num_seqs in (3, 1):
        spans = random_spans(rng, num_seqs, width, rng.sample(range(NUM_BLOCKS), NUM_BLOCKS))
        num_rows = sum(len(span.token_ids) for span in spans)
        before = poisoned_pool(spans, num_seqs)
        pool.copy_(before)
        with torch.inference_mode():
            logits = graphs.run(StepShape(4, width), spans).logits[:num_rows]
        want = eagerly(tiny_model, before, spans)[1][:num_rows]
        torch.testing.assert_close(logits, want, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(pool, before, equal_nan=True, atol=2e-5, rtol=2e-5)


def test_drawn_tokens_go_from_replay_to_replay_without_the_host(tiny_model):
    shapes, rng = StepShapes([4], [1]), random.Random(3)
    step = DrawingStep(tiny_model.module, poisoned_pool([], 0), inputs_for(shapes), max_num_rows=4)
    with operators_of_a_gpu():
        graphs = StepGraphs(step, shapes, Tape())
        graphs.capture()
    spans = random_spans(rng, 3, 1, rng.sample(range(60), 60))
    spans = [replace(span, table=BlockTable([*span.table, 60 + row])) for row, span in enumerate(spans)]
    pool = poisoned_pool(spans, 0)
    step._kv_group.copy_(pool)
    params = [SamplingParams(max_tokens=9, seed=row, temperature=row / 2, top_k=9) for row in range(3)]
    for sources in ([], [2, 0, 1]):
        draws = [Draw(params[row], span.start + 1, row) for row, span in enumerate(spans)]
        with torch.inference_mode():
            graphs.run(StepShape(4, 1), [replace(span, token_ids=[0]) if sources else span for span in spans],
                       draws, sources)  # fmt: skip
        expected = draw_warped(eagerly(tiny_model, pool, spans)[1][:3], draws).tolist()
        assert step.drawn[:, :3].tolist() == [expected, [1, 1, 1]]
        spans = [
            replace(spans[row], start=spans[row].start + 1, token_ids=[expected[row]]) for row in (2, 0, 1)
        ]
        params = [params[row] for row in (2, 0, 1)]


@pytest.mark.parametrize("width", [1, 4])
def test_a_layer_is_at_most_ten_kernels(tiny_model, drafted_model, width):
    """Of two layers and of one, so that what comes once a step cancels out; with contexts that are split."""
    names = []
    for module in (drafted_model.draft.module, tiny_model.module):
        tape, pool = Tape(), torch.zeros(2, 2, NUM_BLOCKS, BLOCK_SIZE, 2, 8)[: len(module.layers)]
        with operators_of_a_gpu():
            graphs_over(module, pool, tape, StepShapes([2], [width]), max_model_len=4096)
        names.append(tape.names)
    once, twice = map(Counter, names)
    layer = twice - once
    assert {"rope_store_kernel", "decode_kernel", "combine_kernel", "silu_mul_kernel"} <= layer.keys()
    assert layer["rms_norm_kernel"] == 2
    assert layer.total() <= 10


def test_a_lent_tensor_does_not_keep_its_memory():
    """Or each captured step would keep its results, and all of them together more than the largest step."""
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    tensor, memory = torch.from_numpy(array)[1:, ::2], weakref.ref(array)
    borrowed = lent(tensor)
    assert torch.equal(borrowed, tensor)
    tensor += 1
    assert torch.equal(borrowed, tensor)
    del array, tensor
    assert memory() is None


def with_graphs(engine):
    """The engine with its decode steps recorded."""
    reruns = Reruns()
    engine._runner._graphs, _ = steps_with(reruns, engine.config, engine.model, engine.kv_cache)
    return engine, reruns


@pytest.mark.parametrize("settings", [{}, {"speculative": "draft"}, {"speculative": "ngram"}])
def test_an_engine_with_captured_steps_gives_the_same_tokens(make_engine, make_request, settings):
    settings = {"num_blocks": 128, "max_num_seqs": 6, "max_num_batched_tokens": 16, **settings}
    if settings.get("speculative"):
        settings["num_draft_tokens"] = 3

    def requests():
        return [
            *(make_request(n, max_tokens=4 + n, temperature=n % 3 / 2) for n in (1, 4, 9, 17)),
            make_request(6, repetition_penalty=1.4, logprobs=2),
            make_request(30, prompt_logprobs=1, typical_p=0.8),
        ]

    engine, reruns = with_graphs(make_engine(**settings))
    assert engine.run(*requests()) == make_engine(**settings).run(*requests())
    assert reruns.num_replays > 3


def test_the_smallest_shape_that_fits_is_taken():
    shapes = StepShapes([1, 2, 4, 8, 16], [1, 4])
    for num_seqs in range(1, 18):
        for width in range(1, 6):
            fitting = [each for each in shapes if each.num_seqs >= num_seqs and each.width >= width]
            assert shapes.fit(num_seqs, width) == min(fitting, default=None)


def test_shapes_come_largest_first_and_none_is_too_large():
    shapes = list(StepShapes(usual_sizes(1000), widths(7)))
    rows = [shape.num_rows for shape in shapes]
    assert rows == sorted(rows, reverse=True)
    assert rows[0] <= MAX_STEP_ROWS
    assert len(set(shapes)) == len(shapes)


def test_every_batch_without_drafts_has_a_shape():
    for max_num_seqs in (1, 3, 8, 100, 256):
        shapes = step_shapes(EngineConfig(max_num_seqs=max_num_seqs))
        assert all(shapes.fit(n, 1) for n in range(1, max_num_seqs + 1))
        assert shapes.max_num_seqs == max_num_seqs
    assert [shape.width for shape in step_shapes(EngineConfig(max_num_seqs=1))] == [1]


def test_drafts_have_shapes_up_to_the_kernels_limit():
    assert widths(0) == [1]
    assert widths(3) == [1, 2, 4]
    assert widths(7) == widths(64) == [1, 2, 4, 8]


@pytest.mark.gpu
def test_cuda_graphs_and_overlap_give_the_tokens_of_neither(checkpoint, gpu):
    def tokens(**settings):
        config = EngineConfig(device=gpu, num_blocks=64, max_num_seqs=8, **settings)
        engine = Engine(config, load_model(checkpoint, config))
        requests = [
            Request(
                key=n,
                prompt_token_ids=[5] * n,
                sampling=SamplingParams(max_tokens=9, seed=n, ignore_eos=True),
            )
            for n in (1, 4, 9)
        ]
        for request in requests:
            engine.submit(request)
        while engine.has_work():
            engine.step()
        return [request.output_token_ids for request in requests]

    plain = tokens(cuda_graphs="off", overlap="off")
    assert tokens(overlap="off") == plain
    assert tokens(cuda_graphs="off", overlap="on") == plain
    assert tokens() == plain
