import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import EngineConfig
from engine.loader import load_model
from engine.models.config import read_config
from runtime.errors import CheckpointError, StartupError

UP = "model.layers.1.mlp.up_proj.weight"


def load(path, **settings):
    return load_model(path, EngineConfig(**settings))


def edit_config(path, **changes):
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def edit_tensors(path, edit):
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")


def shard(path):
    """Split into two shards with an index."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {name: f"shard-{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, path / file)
    edit_index(path, weight_map)
    return weight_map


def edit_index(path, weight_map):
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model_type": ...}, "model_type"),
        ({"model_type": "gpt2"}, "model_type"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"sliding_window": 4096, "use_sliding_window": True}, "sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"hidden_size": ...}, "hidden_size"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"vocab_size": 61.5}, "vocab_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"rms_norm_eps": -1}, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_scaling": [2]}, "rope_scaling"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_scaling.rope_type"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": "4"}}, "rope_parameters.factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.low_freq_factor"),
    ],
)
def test_a_bad_config_names_file_and_key(make_checkpoint, changes, key):
    path = make_checkpoint()
    edit_config(path, **changes)
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path / 'config.json'}: {key}: ")


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff"])
def test_a_config_that_is_no_json_object(make_checkpoint, text):
    path = make_checkpoint()
    (path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match="JSON"):
        load(path)


def test_a_missing_config(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(UP), rf"{UP}: missing, expected a tensor of shape \[40, 32\]"),
        (lambda t: t.update({UP: t[UP].T}), rf"{UP}: expected shape \[40, 32\], got \[32, 40\]"),
        (lambda t: t.update({UP: t[UP].to(torch.int8)}), rf"{UP}: expected type F32 or F16 or BF16, got I8"),
        (lambda t: t.update(extra=torch.zeros(1)), "extra: unexpected tensor"),
        (lambda t: t.pop("lm_head.weight"), r"lm_head\.weight: missing"),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}),
            r"q_proj\.bias: unexpected tensor",
        ),
    ],
)
def test_a_bad_tensor_is_named(make_checkpoint, edit, message):
    path = make_checkpoint()
    edit_tensors(path, edit)
    with pytest.raises(CheckpointError, match=message):
        load(path)


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_truncated_file(make_checkpoint, size):
    file = make_checkpoint() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated"):
        load(file.parent)


def test_a_file_that_is_no_safetensors(make_checkpoint):
    file = make_checkpoint() / "model.safetensors"
    file.write_bytes((20).to_bytes(8, "little") + b"x" * 50)
    with pytest.raises(CheckpointError, match="not a safetensors header"):
        load(file.parent)


def test_overlapping_data_is_found_by_the_reader(make_checkpoint):
    file = make_checkpoint() / "model.safetensors"
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header["lm_head.weight"]["data_offsets"] = [0, 7]
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    with pytest.raises(CheckpointError, match="not readable"):
        load(file.parent)


def test_pickled_weights_are_refused_with_advice(make_checkpoint):
    path = make_checkpoint()
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="save_pretrained"):
        load(path)
    (path / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"expected model\.safetensors"):
        load(path)


def test_shards_hold_the_same_model_as_one_file(make_checkpoint):
    path = make_checkpoint()
    whole = load(path)
    shard(path)
    sharded = load(path)
    assert sharded.facts == whole.facts
    hidden = torch.ones(4, 32)
    assert torch.equal(sharded.module.logits(hidden), whole.module.logits(hidden))


def test_broken_shards_are_named(make_checkpoint):
    path = make_checkpoint()
    weight_map = shard(path)
    edit_index(path, weight_map | {"model.norm.weight": "../elsewhere.safetensors"})
    with pytest.raises(CheckpointError, match="file names of this directory"):
        load(path)
    swapped = dict.fromkeys(weight_map, "shard-0.safetensors")
    edit_index(path, swapped)
    with pytest.raises(CheckpointError, match=r"missing, model\.safetensors\.index\.json says it is here"):
        load(path)
    edit_index(path, weight_map)
    (path / "shard-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shard shard-1\.safetensors is missing"):
        load(path)
    (path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="weight_map: missing"):
        load(path)


def test_harmless_extra_tensors_are_ignored(make_checkpoint):
    path = make_checkpoint(tie_word_embeddings=True)
    facts = load(path).facts
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "lm_head.weight": torch.ones(61, 32),
    }
    edit_tensors(path, lambda tensors: tensors.update(extra))
    assert load(path).facts == facts


def test_the_hash_tells_checkpoints_apart(make_checkpoint):
    path = make_checkpoint()
    hashes = {load(path).facts.model_hash}
    assert load(path).facts.model_hash in hashes
    edit_tensors(path, lambda tensors: tensors[UP].add_(1))
    hashes.add(load(path).facts.model_hash)
    edit_config(path, rms_norm_eps=1e-6)
    hashes.add(load(path).facts.model_hash)
    edit_tensors(path, lambda tensors: tensors.update({UP: tensors[UP].half()}))
    hashes.add(load(path).facts.model_hash)
    assert len(hashes) == 4


def test_facts_name_what_peers_must_share(make_checkpoint):
    path = make_checkpoint(eos_token_id=[2, 5])
    facts = load(path, dtype="bfloat16", max_model_len=50).facts
    assert (facts.vocab_size, facts.max_model_len, facts.eos_token_ids) == (61, 50, (2, 5))
    assert facts.rope == '{"head_dim":8,"rope_theta":10000.0,"rope_type":"default"}'
    (group,) = facts.kv_groups
    assert (group.num_layers, group.num_kv_heads, group.head_dim, group.dtype) == (2, 2, 8, "bfloat16")
    assert group.bytes_per_token == 2 * 2 * 2 * 8 * 2
    (path / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert load(path).facts.eos_token_ids == (7,)


def test_auto_dtype_is_fp32_on_a_cpu(make_checkpoint):
    path = make_checkpoint()
    edit_tensors(path, lambda tensors: tensors.update({k: v.bfloat16() for k, v in tensors.items()}))
    model = load(path)
    assert model.facts.dtype == "float32"
    assert model.module.logits(torch.ones(4, 32)).dtype == torch.float32


def test_a_context_beyond_the_rotary_embedding_is_refused(make_checkpoint):
    with pytest.raises(StartupError, match="--max-model-len 97"):
        load(make_checkpoint(), max_model_len=97)
    stretched = make_checkpoint(rope_scaling={"type": "linear", "factor": 2.0})
    assert read_config(stretched)[0].max_supported_len == 192
    assert load(stretched, max_model_len=192).facts.max_model_len == 192


def test_progress_counts_bytes(make_checkpoint):
    calls = []
    load_model(make_checkpoint(), EngineConfig(), progress=lambda *args: calls.append(args))
    loaded = [done for done, _ in calls]
    assert loaded == sorted(loaded)
    assert (
        calls[-1][0]
        == calls[-1][1]
        == sum(tensor.nbytes for tensor in load_file(make_checkpoint() / "model.safetensors").values())
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"block_size": 0},
        {"num_blocks": 0},
        {"max_num_seqs": 0},
        {"cuda_graph_sizes": (4, 0)},
        {"cuda_graph_sizes": (4, 1025)},
        {"dtype": "int8"},
    ],
)
def test_engine_config_names_the_broken_rule(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        EngineConfig(**settings)
