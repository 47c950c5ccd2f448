"""What is told in the midst of a step is written then, and stays as it was."""

from dataclasses import replace

import pytest
import torch

from engine.config import EngineConfig, usual_layer_stream_threshold
from engine.engine import Engine
from engine.layer_watch import group_ends
from engine.loader import load_model
from tests.unit.engine.parallel_ranks import parallel_model

CONFIG = EngineConfig(num_blocks=64, block_size=4, max_num_batched_tokens=24, layer_stream_threshold=6)
NUM_LAYERS = 5


@pytest.fixture
def path(make_checkpoint):
    return make_checkpoint(num_hidden_layers=NUM_LAYERS)


class Reader:
    """Copies what it is told of, as a link would, and compares it with what lies there at the end."""

    def __init__(self, engine, followers=()):
        self._engine = engine
        self._followers = followers
        self.told = []
        self._seen = []
        engine.model.watch.listen(self)

    def __call__(self, chunks, num_layers):
        for item in chunks:
            request = item.request
            self.told.append((request.key, request.num_computed_tokens, item.context_len, num_layers))
            self._seen.append((request, item.context_len, num_layers, self._read(request, num_layers)))

    def _read(self, request, num_layers):
        """The request's leading layers as they would travel: [num_layers, 2, slots, heads, head_dim]."""
        table = request.block_tables[0]
        pools = [self._engine.kv_cache.pool, *(follower.pool for follower in self._followers)]
        return torch.cat([pool.groups[0][:num_layers, :, table].flatten(2, 3) for pool in pools], dim=-2)

    def check(self):
        """To be called while the requests are held."""
        for request, end, num_layers, seen in self._seen:
            now = self._read(request, num_layers)
            assert torch.equal(seen[:, :, :end], now[:, :, :end])
            assert not now[:, :, :end].isnan().any()


def run_held(engine, *requests):
    for request in requests:
        engine.submit(request)
    while engine.has_work():
        engine.step()
        engine.check()


def watched_run(model, make_request, followers=()):
    engine = Engine(CONFIG, model)
    for group in engine.kv_cache.groups:
        group.fill_(torch.nan)
    reader = Reader(engine, followers)
    run_held(engine, *(make_request(length, prefill_only=True) for length in (5, 30)))
    reader.check()
    return reader.told


def test_groups_end_with_the_last_layer():
    assert [group_ends(n) for n in (1, 3, 4, 5, 10)] == [
        [1],
        [1, 2, 3],
        [1, 2, 3, 4],
        [1, 2, 3, 5],
        [2, 5, 7, 10],
    ]
    assert group_ends(32) == [8, 16, 24, 32]


def test_chunks_of_a_length_are_told_of_by_layers(path, make_request):
    told = watched_run(load_model(path, CONFIG), make_request)
    ends = group_ends(NUM_LAYERS)
    chunks = [(start, end) for _, start, end, _ in told[:: len(ends)]]
    assert [num_layers for *_, num_layers in told] == ends * len(chunks)
    assert {key for key, *_ in told} == {30}
    assert chunks == [(0, 19), (19, 30)]


def test_with_several_ranks_all_have_written(path, make_request, tmp_path):
    with parallel_model(path, CONFIG, 2, tmp_path / "ranks") as model:
        told = watched_run(model, make_request, model.ranks.followers)
    assert len(told) == 2 * len(group_ends(NUM_LAYERS))


def test_tokens_and_decoding_requests_are_as_without(path, make_request):
    def tokens(config):
        engine = Engine(config, load_model(path, config))
        heard = []
        engine.model.watch.listen(lambda chunks, num_layers: heard.append(len(chunks)))
        held, decoded = make_request(30, prefill_only=True), make_request(17)
        engine.submit(decoded)
        run_held(engine, held)
        return held.output_token_ids + decoded.output_token_ids, heard

    plain, heard_plain = tokens(replace(CONFIG, layer_stream_threshold=0))
    watched, heard = tokens(CONFIG)
    assert plain == watched
    assert not heard_plain
    assert set(heard) == {1}, "a request that decodes here has nobody who waits for its layers"


def test_a_pass_outside_of_a_step_is_told_to_nobody(path, make_request):
    """As a draft's, or the profile's: and a step that fails leaves nothing behind."""
    engine = Engine(CONFIG, load_model(path, CONFIG))
    heard = []

    def fail(chunks, num_layers):
        heard.append(num_layers)
        raise ZeroDivisionError

    engine.model.watch.listen(fail)
    engine.submit(make_request(30, prefill_only=True))
    with pytest.raises(ZeroDivisionError):
        engine.step()
    engine.model.watch.passed(2)
    assert heard == [1]


def test_the_threshold_follows_the_device_and_is_no_less_than_nothing():
    assert usual_layer_stream_threshold("cuda:1") > usual_layer_stream_threshold("cpu") == 0
    with pytest.raises(ValueError, match="layer_stream_threshold"):
        EngineConfig(layer_stream_threshold=-1)
