"""Tensor parallelism: several ranks compute what one does, each with its part of weights and KV."""

import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from engine.choices import fan_out
from engine.config import EngineConfig
from engine.engine import Engine
from engine.loader import load_checkpoint, load_model
from engine.models.config import read_config
from engine.models.embedding import PlainEmbedding
from engine.models.llama_weights import weight_table
from engine.parallel.errors import RankLost
from engine.parallel.groups import GlooGroup
from engine.parallel.layers import VocabParallelEmbedding
from engine.parallel.shard import Shard, require_divisible
from engine.parallel.slices import cut
from engine.parallel.wire import Op
from engine.safetensors_dir import TensorReader
from kernels.attention import AttentionBatch
from runtime.errors import StartupError
from tests.unit.engine.parallel_ranks import on_ranks, parallel_model, run

CONFIG = EngineConfig(num_blocks=64, block_size=4)

BIASED = {"attention_bias": True, "mlp_bias": True}
TIED = {"tie_word_embeddings": True}
ONE_KV_HEAD = {"num_key_value_heads": 1}
QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False}
QWEN3 = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 16}
WIDE = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
CHECKPOINTS = {
    "llama": {},
    "biased": BIASED,
    "tied": TIED,
    "one_kv_head": ONE_KV_HEAD,
    "wide": WIDE,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
}


@pytest.fixture
def requests(make_request):
    """Greedy and seeded, with choices that share blocks; a fresh list each time."""

    def make():
        return [
            make_request(5, temperature=0.0, max_tokens=6),
            make_request(17, max_tokens=6),
            make_request(30, temperature=0.0, logprobs=2, max_tokens=6),
        ]

    return make


def batch(num_tokens, context_len, block_ids):
    return AttentionBatch(
        query_lens=[num_tokens],
        context_lens=[context_len],
        block_tables=[block_ids],
        block_size=4,
        device=torch.device("cpu"),
    )


def logits_of(model):
    """Of a prompt of 10 tokens at every position, and of one more token behind it."""
    engine = Engine(CONFIG, model)
    for group in engine.kv_cache.groups:
        group.fill_(torch.nan)
    slots = torch.tensor([7 * 4 + i for i in range(4)] + [3 * 4 + i for i in range(4)] + [0, 1, 2])
    found = []
    with torch.inference_mode():
        for start, end in ((0, 10), (10, 11)):
            padding = [0] * max(4 - (end - start), 0)
            hidden = model.module.forward(
                torch.tensor([*range(3 + start, 3 + end), *padding]),
                torch.tensor([*range(start, end), *padding]),
                engine.kv_cache.groups[0],
                slots[start:end],
                batch(end - start, end, [7, 3, 0]),
            )
            found.append(model.module.logits(hidden)[: end - start])
    return torch.cat(found)


@pytest.mark.parametrize("name", ["llama", "biased", "tied", "one_kv_head", "wide", "qwen2", "qwen3"])
@pytest.mark.parametrize("size", [2, 4])
def test_logits_are_those_of_one_rank(make_checkpoint, tmp_path, size, name):
    path = make_checkpoint(**CHECKPOINTS[name])
    expected = logits_of(load_model(path, CONFIG))
    with parallel_model(path, CONFIG, size, tmp_path / "ranks") as model:
        found = logits_of(model)
    scale = expected.abs().max()
    assert expected.shape == found.shape == (11, 61)
    assert (found - expected).abs().max() < 2e-5 * scale


@pytest.mark.parametrize("size", [2, 4])
def test_tokens_are_those_of_one_rank(checkpoint, tiny_model, requests, tmp_path, size):
    expected = run(Engine(CONFIG, tiny_model), requests())
    with parallel_model(checkpoint, CONFIG, size, tmp_path / "ranks") as model:
        assert run(Engine(CONFIG, model), requests()) == expected


def test_copies_and_swaps_reach_every_rank(checkpoint, make_request, tmp_path):
    """Choices write into copies of shared blocks, and a small pool swaps requests out and in."""
    config = replace(CONFIG, num_blocks=12, max_model_len=48, preemption_mode="swap")

    def outcome(model):
        made = [make_request(n, max_tokens=10) for n in (9, 14)]
        for request in made:
            fan_out(request, dict.fromkeys(range(2), ()))
        samplers = [each for request in made for each in request.samplers]
        run(Engine(config, model), made)
        return [each.output_token_ids for each in samplers]

    expected = outcome(load_model(checkpoint, config))
    with parallel_model(checkpoint, config, 2, tmp_path / "ranks") as model:
        told, tell = set(), model.ranks.tell
        model.ranks.tell = lambda op, *arrays: (told.add(op), tell(op, *arrays))
        assert outcome(model) == expected
    assert {Op.COPY, Op.STORE, Op.LOAD} <= told


def test_every_rank_reads_its_slices_alone(make_checkpoint, monkeypatch):
    """Together the ranks read every byte of what is shared once, and what is replicated once each."""
    path = make_checkpoint(**BIASED, **WIDE)
    read = []
    original = TensorReader.read

    def counting(self, tensor, part=()):
        data = original(self, tensor, part)
        read[-1] += data.nbytes
        return data

    monkeypatch.setattr(TensorReader, "read", counting)
    progress = []
    for rank in range(4):
        read.append(0)
        load_checkpoint(path, CONFIG, shard=Shard(rank, 4), progress=lambda *counts: progress.append(counts))
        assert progress[-1] == (read[-1], read[-1])
    stored = load_file(path / "model.safetensors")
    once = sum(tensor.nbytes for tensor in stored.values())
    replicated = sum(tensor.nbytes for name, tensor in stored.items() if "norm" in name)
    assert sum(read) == once + 3 * replicated
    assert max(read) - min(read) <= 0.1 * max(read)


@pytest.mark.parametrize("name", ["llama", "biased", "tied", "wide", "qwen2", "qwen3"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_slices_of_all_ranks_are_the_tensors(make_checkpoint, name, size):
    config, _ = read_config(make_checkpoint(**CHECKPOINTS[name]))
    table = weight_table(config)
    cells = {}
    for rank in range(size):
        for spec in cut(table, config, Shard(rank, size)):
            for source in spec.sources:
                count = cells.setdefault(source.name, torch.zeros(source.shape))
                count[source.indices] += 1
    for spec in table:
        for i, source in enumerate(spec.sources):
            copies = 1
            if spec.kind.endswith("norm"):
                copies = size
            elif spec.kind == "qkv" and i > 0:
                copies = max(size // config.num_kv_heads, 1)
            assert (cells[source.name] == copies).all(), source.name


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        (3, "num_attention_heads 4 is no multiple of it; intermediate_size 40 is no multiple"),
        (8, "num_attention_heads 4 is no multiple"),
    ],
)
def test_what_cannot_be_shared_is_refused(checkpoint, size, reason):
    config, _ = read_config(checkpoint)
    with pytest.raises(StartupError, match=f"--tensor-parallel-size {size}: {reason}"):
        require_divisible(config, size)
    with pytest.raises(StartupError, match="num_key_value_heads 3 is neither a multiple nor a divisor"):
        require_divisible(replace(config, num_q_heads=12, num_kv_heads=3, intermediate_size=48), 2)


def test_a_rank_without_rows_of_the_vocabulary_is_refused(checkpoint):
    config = replace(read_config(checkpoint)[0], vocab_size=5)
    require_divisible(config, 2)
    with pytest.raises(StartupError, match="vocab_size 5 is too small"):
        require_divisible(config, 4)


@pytest.mark.parametrize("size", [2, 4])
def test_looked_up_vectors_keep_their_bits(tmp_path, size):
    weight = torch.randn(61, 8, generator=torch.Generator().manual_seed(0))
    weight[7], weight[8, 3] = torch.nan, torch.inf
    token_ids = torch.tensor([*range(61), 0, 60, 8])
    found = on_ranks(size, tmp_path / "store", lambda group, shard: lookup(weight, token_ids, group, shard))
    expected = PlainEmbedding(weight).lookup(token_ids)
    assert all(torch.equal(each.view(torch.int32), expected.view(torch.int32)) for each in found)


def lookup(weight, token_ids, group, shard):
    vocab = shard.of(len(weight))
    rows = PlainEmbedding(weight[vocab.start : vocab.stop])
    return VocabParallelEmbedding(rows, group, vocab).lookup(token_ids)


def test_tied_embeddings_are_one_tensor_on_every_rank(make_checkpoint):
    path = make_checkpoint(**TIED)
    for rank in range(2):
        module, _ = load_checkpoint(path, CONFIG, shard=Shard(rank, 2))
        assert module.embed.weight is module.lm_head.weight
        assert len(module.embed.weight) == (31, 30)[rank]


def test_a_lost_rank_ends_the_engine_and_is_named_once(checkpoint, tmp_path, requests):
    lost = []
    with parallel_model(checkpoint, CONFIG, 2, tmp_path / "ranks") as model:
        engine = Engine(CONFIG, model)
        model.ranks.watch(lost.append)
        for request in requests():
            engine.submit(request)
        engine.step()
        model.ranks.members[0].commands.close()  # the follower ends, as if its process had
        with pytest.raises(RankLost, match="rank 1 does not listen"):
            engine.step()
        with pytest.raises(RankLost, match="rank 1 does not listen"):
            engine.kv_cache.pool.copy(0, [0], [1])
    assert len(lost) == 1


def test_a_roll_is_answered_by_ranks_that_listen(checkpoint, tmp_path):
    with parallel_model(checkpoint, CONFIG, 2, tmp_path / "ranks") as model:
        model.ranks.call_roll()
        model.ranks.followers[0]._handlers[Op.ROLL] = lambda message: None
        model.ranks.members[0].commands.set_timeout(0.05)
        with pytest.raises(RankLost, match="rank 1 does not answer"):
            model.ranks.call_roll()


def test_a_hung_rank_is_found_by_the_deadline(tmp_path):
    groups = {}

    def join(rank):
        groups[rank] = GlooGroup.open(tmp_path / "store", Shard(rank, 2), timeout_s=0.1)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with pytest.raises(RankLost):
        groups[0].all_reduce(torch.ones(3))
    for group in groups.values():
        group.close()
    with pytest.raises(RankLost):
        groups[1].all_reduce(torch.ones(3))


def test_the_sum_of_a_row_does_not_depend_on_its_batch(tmp_path):
    """As the fp32 rule of exactness asks; gloo's own all-reduce does not give that beyond two ranks."""
    rows = torch.randn(4, 64, 32, generator=torch.Generator().manual_seed(0))
    sums = on_ranks(
        4,
        tmp_path / "store",
        lambda group, shard: [group.all_reduce(rows[shard.rank, :count]) for count in (64, 5)],
    )
    for whole, part in sums:
        assert torch.equal(whole[:5], part)
        assert torch.equal(whole, sums[0][0])
        assert torch.allclose(whole, rows.sum(0), atol=1e-5)
