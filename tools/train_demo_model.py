"""Trains the bundled demo model and its draft: `python tools/train_demo_model.py OUT [--quick]`.

1. Corpus: functions, classes and longer methods, cut out of the running Python's standard library.
2. Tokenizer: byte-level BPE over words, numbers, punctuation runs and indentation.
3. Target: a Llama of 5.5 M parameters, next-token cross-entropy in two rounds of a cosine schedule.
4. Draft: 0.9 M parameters, the same, then distilled on the target (KL, Hinton et al. 2015).
5. Both are written as Hugging Face checkpoints in bfloat16: OUT and OUT/draft.
"""

import argparse
import ast
import itertools
import json
import math
import random
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

SPECIALS = ["<|bos|>", "<|eos|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>"]
BOS, EOS = 0, 1
VOCAB_SIZE = 4096
CONTEXT = 2048
SPLIT = r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\n[ ]*|[ ]+|\s+"
SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "encodings",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "site-packages",
}
SKIPPED_FILES = {"pydoc_data/topics.py", "_sysconfigdata", "_pydecimal.py"}
HELD_OUT_EVERY = 50
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ message['content'] }}\n{% else %}# {{ message['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}def {% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of one Llama; rotary base 10,000, tied embeddings."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    head_dim: int = 32


TARGET = Shape(hidden=256, layers=6, heads=8, kv_heads=4, intermediate=704)
DRAFT = Shape(hidden=128, layers=2, heads=4, kv_heads=2, intermediate=352)


@dataclass(frozen=True, kw_only=True)
class Round:
    """One run of the optimiser: a warm-up, then a cosine down to a tenth of the peak."""

    steps: int
    peak_lr: float
    length: int
    """Tokens of a sequence."""
    batch: int = 16


def snippets(root: Path) -> Iterator[str]:
    """Definitions of 60 to 12,000 ASCII characters from every module below `root`."""
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if SKIPPED_FOLDERS & set(inside.parts) or any(name in str(inside) for name in SKIPPED_FILES):
            continue
        try:
            source = path.read_text(encoding="ascii")
            tree = ast.parse(source)
        except (UnicodeDecodeError, SyntaxError):
            continue
        yield from (text for text in _definitions(source, tree) if 60 <= len(text) <= 12_000)


def _definitions(source: str, tree: ast.Module) -> Iterator[str]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in tree.body:
        if not isinstance(node, kinds):
            continue
        yield ast.get_source_segment(source, node) or ""
        if isinstance(node, ast.ClassDef):
            methods = [item for item in node.body if isinstance(item, kinds)]
            yield from (_dedented(source, item) for item in methods if item.end_lineno - item.lineno >= 8)


def _dedented(source: str, node: ast.stmt) -> str:
    lines = source.splitlines()[node.lineno - 1 : node.end_lineno]
    return "\n".join(line[node.col_offset :] for line in lines)


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE with VOCAB_SIZE tokens; encoding text puts the start token first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(name, special=True, normalized=False) for name in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIALS[BOS]} $A", special_tokens=[(SPECIALS[BOS], BOS)]
    )
    return tokenizer


def pack(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """One long row of token ids, every text between start and end token.  [num_tokens]"""
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(texts):
        ids += [*encoding.ids, EOS]
    return torch.tensor(ids, dtype=torch.int64)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions (half-split, as in Hugging Face's Llama)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.q_proj = nn.Linear(shape.hidden, shape.heads * shape.head_dim, bias=False)
        self.k_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.v_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.o_proj = nn.Linear(shape.heads * shape.head_dim, shape.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [batch, length, hidden]; cos, sin: [length, head_dim]."""
        batch, length, _ = x.shape
        q, k, v = (
            proj(x).view(batch, length, -1, self.shape.head_dim).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (part * cos + _rotate_half(part) * sin for part in (q, k))
        group = self.shape.heads // self.shape.kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


def _rotate_half(x: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return torch.cat((-high, low), -1)


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, length, hidden]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Pre-norm attention, then pre-norm MLP."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden, eps=1e-5)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden, eps=1e-5)
        self.mlp = Mlp(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [batch, length, hidden]."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Names of parameters, with `model.` before them, are those of a Hugging Face checkpoint."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(VOCAB_SIZE, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=1e-5)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                # Output projections start smaller, so that the residual stream's variance does not grow.
                scale = (
                    1.0 / math.sqrt(2 * shape.layers)
                    if name.endswith(("o_proj.weight", "down_proj.weight"))
                    else 1.0
                )
                nn.init.normal_(weight, std=0.02 * scale)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of ids [batch, length].  [batch, length, vocab_size]"""
        dim = self.shape.head_dim
        inverse = 10_000.0 ** (-torch.arange(0, dim, 2, device=ids.device) / dim)
        angles = torch.arange(ids.shape[1], device=ids.device)[:, None] * inverse
        cos, sin = (table.repeat(1, 2) for table in (angles.cos(), angles.sin()))
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.linear(self.norm(x), self.embed_tokens.weight)


Loss = Callable[[Tensor, Tensor], Tensor]
"""Loss of the logits for ids [batch, length + 1]."""


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Cross-entropy in nats per token."""
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def distillation_loss(teacher: Llama) -> Loss:
    """KL divergence from the teacher's distribution to the student's, in nats per token."""

    def loss(logits: Tensor, ids: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = F.log_softmax(teacher(ids[:, :-1]).float(), -1)
        found = F.log_softmax(logits.float(), -1)
        return F.kl_div(found.flatten(0, 1), wanted.flatten(0, 1), log_target=True, reduction="batchmean")

    return loss


def batches(data: Tensor, length: int, batch: int, device: torch.device) -> Iterator[Tensor]:
    """Random windows of `length` + 1 tokens, without end.  [batch, length + 1]"""
    while True:
        starts = torch.randint(0, len(data) - length - 1, (batch,))
        yield torch.stack([data[start : start + length + 1] for start in starts.tolist()]).to(device)


def train(model: Llama, data: Tensor, plan: Round, loss_of: Loss, label: str) -> None:
    """One round of AdamW with decay 0.1 on matrices and gradients clipped to norm 1."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=plan.peak_lr, betas=(0.9, 0.95))
    device = model.embed_tokens.weight.device
    source = batches(data, plan.length, plan.batch, device)
    warmup = max(1, plan.steps // 20)
    start = time.perf_counter()
    for step in range(plan.steps):
        progress = max(0.0, (step - warmup) / max(1, plan.steps - warmup))
        scale = min(1.0, (step + 1) / warmup) * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = plan.peak_lr * scale
        ids = next(source)
        # On CPUs the backward pass in bfloat16 takes 25 times as long as in float32.
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(ids[:, :-1])
        loss = loss_of(logits, ids)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == plan.steps - 1:
            print(f"{label} {step:6}/{plan.steps} loss {loss.item():.3f} {time.perf_counter() - start:.0f} s")


@torch.no_grad()
def evaluate(model: Llama, data: Tensor, length: int, num_batches: int) -> float:
    """Cross-entropy on held-out text, nats per token."""
    source = batches(data, length, 8, model.embed_tokens.weight.device)
    losses = [
        next_token_loss(model(ids[:, :-1]), ids).item()
        for ids, _ in zip(source, range(num_batches), strict=False)
    ]
    return sum(losses) / len(losses)


def hf_config(shape: Shape) -> dict[str, object]:
    """config.json of a LlamaForCausalLM."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": 2,
        "dtype": "bfloat16",
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": CONTEXT,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": True,
        "vocab_size": VOCAB_SIZE,
    }


def write(model: Llama, tokenizer: Tokenizer, out: Path) -> None:
    """A Hugging Face checkpoint in directory `out`."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {
        f"model.{name}": p.detach().to("cpu", torch.bfloat16).contiguous()
        for name, p in model.named_parameters()
    }
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"))
    sampling = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": 2}
    files: dict[str, dict[str, object]] = {
        "config.json": hf_config(model.shape),
        "generation_config.json": sampling | {"do_sample": True, "temperature": 0.7, "top_p": 0.95},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": SPECIALS[BOS],
            "eos_token": SPECIALS[EOS],
            "pad_token": SPECIALS[2],
            "model_max_length": CONTEXT,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    }
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    """Train both and write them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--steps", type=int, default=2200, help="steps of the target; the draft takes as many"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a toy, in under a minute")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    device = torch.device(arguments.device)
    found = snippets(Path(sysconfig.get_paths()["stdlib"]))
    texts = list(dict.fromkeys(itertools.islice(found, 600 if arguments.quick else None)))
    random.Random(arguments.seed).shuffle(texts)
    steps = 12 if arguments.quick else arguments.steps
    held_out = texts[::HELD_OUT_EVERY]
    training = [text for index, text in enumerate(texts) if index % HELD_OUT_EVERY]
    print(f"{len(training)} texts, {sum(map(len, training)) / 1e6:.1f} MB")
    tokenizer = train_tokenizer(training)
    data, check = pack(tokenizer, training), pack(tokenizer, held_out)
    long, short = (64, 64) if arguments.quick else (384, 256)
    target, draft = Llama(TARGET).to(device), Llama(DRAFT).to(device)
    train(target, data, Round(steps=steps * 2 // 3, peak_lr=2e-3, length=long), next_token_loss, "target")
    train(target, data, Round(steps=steps // 3, peak_lr=8e-4, length=long), next_token_loss, "target again")
    train(draft, data, Round(steps=steps, peak_lr=2e-3, length=short), next_token_loss, "draft")
    train(
        draft,
        data,
        Round(steps=steps, peak_lr=1.5e-3, length=short),
        distillation_loss(target),
        "distillation",
    )
    for name, model in (("target", target), ("draft", draft)):
        loss = evaluate(model, check, short, 2 if arguments.quick else 40)
        print(f"{name}: {loss:.3f} nats per held-out token")
    write(target, tokenizer, arguments.out)
    write(draft, tokenizer, arguments.out / "draft")


if __name__ == "__main__":
    main()
