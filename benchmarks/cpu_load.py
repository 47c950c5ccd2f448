"""The load of `make bench-cpu`: a random Llama of 27M parameters, and 32 requests of mixed lengths."""

import json
import random
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from benchmarks.peers.arm import Job
from engine.models.config import read_config
from engine.models.llama_weights import weight_table

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 9216,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "dtype": "float32",
}
"""26.9M parameters."""

FIRST_ORDINARY_TOKEN = 3
NUM_REQUESTS = 32
PROMPT_LENS = (32, 512)
OUTPUT_LENS = (16, 64)


def write_checkpoint(path: Path) -> None:
    """The model with its tokenizer as a Hugging Face directory; the same bytes each time."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG, indent=2))
    config, _ = read_config(path)
    generator = torch.Generator().manual_seed(0)
    sources = [source for spec in weight_table(config) for source in spec.sources]
    tensors = {
        source.name: torch.randn(source.shape, generator=generator) * 0.05
        if len(source.shape) > 1
        else torch.ones(source.shape)
        for source in sources
    }
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(path, CONFIG["vocab_size"])


def write_tokenizer(path: Path, vocab_size: int) -> None:
    """Words t0, t1, …: a token each."""
    vocab = {f"t{token_id}": token_id for token_id in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path / "tokenizer.json"))
    special = {"bos_token": "t1", "eos_token": "t2", "pad_token": "t0", "unk_token": "t0"}
    text = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special})
    (path / "tokenizer_config.json").write_text(text)


def make_job(model: Path, peer_model: Path, *, dtype: str, threads: int, max_num_batched_tokens: int) -> Job:
    """The requests, the same for every arm."""
    rng = random.Random(0)
    prompts, output_lens = [], []
    for _ in range(NUM_REQUESTS):
        length = rng.randint(*PROMPT_LENS)
        prompts.append([rng.randrange(FIRST_ORDINARY_TOKEN, CONFIG["vocab_size"]) for _ in range(length)])
        output_lens.append(rng.randint(*OUTPUT_LENS))
    return Job(
        model=str(model),
        peer_model=str(peer_model),
        dtype=dtype,
        threads=threads,
        max_num_batched_tokens=max_num_batched_tokens,
        prompts=prompts,
        output_lens=output_lens,
    )
