"""The engine against transformers, fp32 and eager attention: checkpoints, tokens, logits processors."""

import json
from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.loader import load_model
from engine.models.rope import rope_tables
from engine.request import Request, SamplingParams
from engine.sampler import Sampler
from engine.warpers import warp
from kernels import ops

torch.set_num_threads(1)
DEMO_MODEL = Path(__file__).parents[2] / "tandem" / "demo_model"
PROMPT_LENS = (1, 6, 33, 80)
NUM_TOKENS = 20

SIZES = {
    "vocab_size": 199,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "eos_token_id": None,
    "bos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}

CHECKPOINTS = {
    "gqa": {},
    "mha": {"num_key_value_heads": 6},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_dim": {"head_dim": 16},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10_000.0}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 10_000.0}},
    "llama3": {"rope_parameters": {**LLAMA3, "rope_theta": 5000.0}},
    "yarn": {"rope_parameters": {**YARN, "rope_theta": 10_000.0}},
    "yarn_options": {
        "rope_parameters": {
            **YARN, "rope_theta": 10_000.0, "beta_fast": 16.0, "beta_slow": 2.0,
            "mscale": 1.0, "mscale_all_dim": 0.7, "truncate": False,
        }
    },
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "qwen3_biases": {"head_dim": 8, "attention_bias": True},
    "sharded": {},
    "bf16": {},
    "fp16": {},
}  # fmt: skip


@pytest.fixture(scope="module")
def transformers():
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers


def save(transformers, name: str, path: Path):
    """A random checkpoint of CHECKPOINTS, saved by transformers; returns its fp32 model."""
    torch.manual_seed(len(name))
    family = {"qwen2": "Qwen2", "qwen3": "Qwen3"}.get(name.partition("_")[0], "Llama")
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **CHECKPOINTS[name]})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.uniform_(0.5, 1.5)
    model = model.to({"bf16": torch.bfloat16, "fp16": torch.float16}.get(name, torch.float32))
    model.save_pretrained(path, max_shard_size="40KB" if name == "sharded" else "1GB")
    return eager(transformers, path)


def eager(transformers, path: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def prompts(vocab_size: int, lens=PROMPT_LENS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, vocab_size, (n,), generator=generator).tolist() for n in lens]


def generate(model, prompt: list[int], num_tokens: int = NUM_TOKENS) -> list[int]:
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=num_tokens, do_sample=False, eos_token_id=None
    )
    return out[0, len(prompt) :].tolist()


def run(engine: Engine, prompts: list[list[int]], **sampling) -> list[list[int]]:
    params = SamplingParams(**{"max_tokens": NUM_TOKENS, "temperature": 0.0, "ignore_eos": True, **sampling})
    requests = [Request(key=i, prompt_token_ids=p, sampling=params) for i, p in enumerate(prompts)]
    for request in requests:
        engine.submit(request)
    while engine.has_work():
        engine.step()
        engine.check()
    return [request.output_token_ids for request in requests]


def make_engine(path: Path, **settings) -> Engine:
    config = EngineConfig(**{"kv_cache_memory_bytes": 32 << 20, **settings})
    return Engine(config, load_model(path, config))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_greedy_tokens_of_random_checkpoints(transformers, tmp_path, name):
    model = save(transformers, name, tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists() == (name == "sharded")
    engine = make_engine(tmp_path, max_num_batched_tokens=50)
    assert engine.facts.dtype == "float32"
    asked = prompts(SIZES["vocab_size"])
    assert run(engine, asked) == [generate(model, prompt) for prompt in asked]


def test_mistral_without_a_sliding_window(transformers, tmp_path):
    torch.manual_seed(0)
    config = transformers.MistralConfig(**SIZES, head_dim=16, sliding_window=None)
    transformers.MistralForCausalLM(config).save_pretrained(tmp_path)
    model = transformers.MistralForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    asked = prompts(SIZES["vocab_size"])
    assert run(make_engine(tmp_path), asked) == [generate(model, prompt) for prompt in asked]


def test_greedy_tokens_of_the_demo_model(transformers):
    model = eager(transformers, DEMO_MODEL)
    asked = prompts(4096, (1, 17, 100, 300))
    want = [generate(model, prompt, 32) for prompt in asked]
    for settings in ({}, {"max_num_batched_tokens": 64}, {"block_size": 4}):
        assert run(make_engine(DEMO_MODEL, **settings), asked, max_tokens=32) == want


def test_logprobs_are_those_of_the_model(transformers):
    model = eager(transformers, DEMO_MODEL)
    (prompt,) = prompts(4096, (40,))
    engine = make_engine(DEMO_MODEL)
    params = SamplingParams(max_tokens=8, temperature=0.7, seed=3, logprobs=3, repetition_penalty=1.5)
    request = Request(key=0, prompt_token_ids=prompt, sampling=params)
    engine.submit(request)
    reported = []
    while engine.has_work():
        reported += [logprob for output in engine.step().outputs for logprob in output.logprobs]
    sequence = torch.tensor([prompt + request.output_token_ids])
    with torch.no_grad():
        logprobs = model(sequence).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    assert len(reported) == len(request.output_token_ids)
    for row, token_id, logprob in zip(logprobs, request.output_token_ids, reported, strict=True):
        assert logprob.logprob == pytest.approx(float(row[token_id]), abs=1e-4)
        top = row.topk(3)
        assert [each[0] for each in logprob.top] == top.indices.tolist()
        assert [each[1] for each in logprob.top] == pytest.approx(top.values.tolist(), abs=1e-4)


def test_older_rope_configs_mean_the_same(transformers, tmp_path):
    for name in ("linear", "llama3", "yarn"):
        model = save(transformers, name, tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        rope["type" if name == "linear" else "rope_type"] = rope.pop("rope_type")
        (tmp_path / name / "config.json").write_text(json.dumps({**config, "rope_scaling": rope}))
        asked = prompts(SIZES["vocab_size"])
        assert run(make_engine(tmp_path / name), asked) == [generate(model, prompt) for prompt in asked]


def test_dynamic_rope_is_fixed_for_the_longest_context(transformers, tmp_path):
    save(transformers, "dynamic", tmp_path)
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding
    config = transformers.LlamaConfig.from_pretrained(tmp_path)
    for max_model_len in (128, 200, 384):
        engine_config = EngineConfig(max_model_len=max_model_len)
        loaded = load_model(tmp_path, engine_config)
        embedding = rotary(config)
        # transformers rescales with the longest position that it has seen; ours is there from the start
        cos, sin = embedding(torch.zeros(1), torch.arange(max_model_len)[None])
        tables = rope_tables(
            loaded.module.config.rope, head_dim=8, max_position_embeddings=128, max_model_len=max_model_len
        )
        torch.testing.assert_close(tables.cos, cos[0, :, :4], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(tables.sin, sin[0, :, :4], atol=1e-5, rtol=1e-5)
    short, long = prompts(199, (100, 300))
    engine = make_engine(tmp_path, max_model_len=384)
    together, alone = run(engine, [short, long]), run(engine, [short])
    assert together[0] == alone[0]


@pytest.mark.parametrize("name", ["gqa", "yarn"])
def test_split_engines_match_transformers(transformers, tmp_path, name):
    model = save(transformers, name, tmp_path)
    prefill = make_engine(tmp_path, max_num_batched_tokens=32)
    decode = make_engine(tmp_path)
    slab = torch.empty(1 << 20, dtype=torch.uint8)
    asked = prompts(SIZES["vocab_size"])
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    moved = []
    for i, prompt in enumerate(asked):
        source = Request(key=i, prompt_token_ids=prompt, sampling=params, prefill_only=True)
        target = Request(key=i, prompt_token_ids=prompt, sampling=params)
        prefill.submit(source)
        assert decode.reserve(target)
        outputs = []
        while prefill.has_work():
            outputs += prefill.step().outputs
        (ours,), (theirs,) = prefill.kv_cache.groups, decode.kv_cache.groups
        num_bytes = ops.gather_blocks(ours, source.block_tables[0], 0, 3, slab)
        received = slab.clone()
        assert ops.checksum(received[:num_bytes]) == ops.checksum(slab[:num_bytes])
        ops.scatter_blocks(theirs, target.block_tables[0], 0, 3, received)
        decode.commit(target, outputs[0].token_ids[0], None)
        prefill.release(i)
        moved.append(target)
    while decode.has_work():
        decode.step()
        decode.check()
    assert [request.output_token_ids for request in moved] == [generate(model, prompt) for prompt in asked]


def processed(transformers, params: SamplingParams, prompt: list[int], outputs: list[int], logits):
    """transformers' processors and warpers in its own order, for one row of logits."""
    t = transformers
    ids = torch.tensor([prompt + outputs])
    processors = t.LogitsProcessorList()
    if params.logit_bias:
        processors.append(t.SequenceBiasLogitsProcessor([[[k], v] for k, v in params.logit_bias.items()]))
    if params.repetition_penalty != 1:
        processors.append(t.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.min_tokens:
        end = [2, *params.stop_token_ids]
        processors.append(t.MinNewTokensLengthLogitsProcessor(len(prompt), params.min_tokens, end))
    processors.append(t.TemperatureLogitsWarper(params.temperature))
    if params.top_k > 0:
        processors.append(t.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(t.TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        processors.append(t.MinPLogitsWarper(params.min_p))
    return processors(ids, logits.clone().unsqueeze(0))[0]


SAMPLING_CASES = [
    {},
    {"temperature": 0.5},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 10_000},
    {"top_p": 0.3},
    {"top_p": 0.95},
    {"top_p": 0.0001},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6},
    {"logit_bias": {3: 5.0, 40: -100.0}},
    {"min_tokens": 9, "stop_token_ids": (17, 5)},
    {"temperature": 1.8, "top_k": 40, "top_p": 0.8, "min_p": 0.02, "repetition_penalty": 1.2},
    {"temperature": 0.3, "top_k": 5, "top_p": 0.9, "logit_bias": {7: 3.0}, "min_tokens": 9},
]


def test_the_sampler_processes_logits_as_transformers_does(transformers):
    torch.manual_seed(1)
    logits = torch.randn(len(SAMPLING_CASES), 120) * 3
    requests = []
    for row, case in enumerate(SAMPLING_CASES):
        params = SamplingParams(**{"max_tokens": 50, "temperature": 1.0, **case})
        tokens = torch.randint(0, 120, (30,)).tolist()
        requests.append(
            Request(key=row, prompt_token_ids=tokens[:22], output_token_ids=tokens[22:], sampling=params)
        )
    untouched = logits.clone()
    got = warp(Sampler((2,), 120)._edit(logits, requests), [request.sampling for request in requests])
    assert torch.equal(logits, untouched)
    for row, request in enumerate(requests):
        want = processed(
            transformers, request.sampling, request.prompt_token_ids, request.output_token_ids, logits[row]
        )
        torch.testing.assert_close(got[row], want, msg=lambda text, row=row: f"{SAMPLING_CASES[row]}: {text}")
