"""Tokens per second with speculation over without: `make bench-speculation`.

One process, the co-located engine, the bundled pair, texts of Python's standard library, which is what the
pair was trained on. For each batch size the same requests, at least MIN_REQUESTS different ones, run with
speculation off and on, in turns; only steps in which every request decodes are timed, in CPU-seconds of this
process, because the machine may be shared. Arms: the draft model, n-grams on text that repeats itself, and
an oracle that knows the undisturbed output and errs at a given rate, so that acceptance can be chosen.
Predicted: (1 - a^(k+1)) / (1 - a) / (v + k c) with the measured acceptance a, mean draft length k and cost c
of a draft token in target steps. Verifying is free in theory (v = 1), as it nearly is where a step is bound
by memory; "with rows" takes v as measured: the cost of a step of batch * (k + 1) rows in steps of batch rows.
"""

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import process_time

import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.engine import Engine
from engine.loader import LoadedModel, load_model
from engine.plan import Scheduled
from engine.request import Request, SamplingParams
from engine.speculative.factory import speculation_with
from engine.speculative.proposer import Draft
from runtime.checkpoint_dir import bundled_model

BATCHES = (1, 4, 8, 32)
PROMPT_TOKENS = 64
MIN_REQUESTS = 8
CORPUS = Path(argparse.__file__).parent


class Oracle:
    """Drafts the undisturbed output, each token wrong with probability 1 - rate."""

    max_draft_tokens = 8
    reads_hidden = False

    def __init__(self, outputs: dict[object, list[int]], rate: float) -> None:
        self._outputs = outputs
        self._rate = rate
        self._random = random.Random(0)

    def propose(self, plan: Sequence[Scheduled]) -> list[Draft]:
        return [self._draft(item) for item in plan]

    def _draft(self, item: Scheduled) -> Draft:
        start = len(item.request.output_token_ids)
        right = self._outputs[item.request.key][start : start + item.num_draft_tokens]
        return Draft(
            tuple(token if self._random.random() < self._rate else (token + 1) % 4096 for token in right)
        )

    def follow(self, plan: Sequence[Scheduled], hidden: Tensor) -> None: ...

    def rewind(self, request: Request, num_accepted: int) -> None: ...


@dataclass
class Measured:
    """One arm at one batch size."""

    arm: str
    batch: int
    speedup: float
    acceptance: float
    mean_draft_length: float
    tokens_per_step: float
    predicted: float
    predicted_with_rows: float
    identical: bool


def requests(
    members: Sequence[int], prompts: list[list[int]], num_tokens: int, temperature: float
) -> list[Request]:
    return [
        Request(
            key=i,
            prompt_token_ids=prompts[i],
            sampling=SamplingParams(max_tokens=num_tokens, temperature=temperature, seed=i, ignore_eos=True),
        )
        for i in members
    ]


def run(engine: Engine, batch: list[Request]) -> tuple[float, int, int]:
    """(CPU-seconds, tokens, steps) of the steps in which all requests decode."""
    for request in batch:
        engine.submit(request)
    while any(not request.output_token_ids for request in batch):
        engine.step()
    before = sum(len(request.output_token_ids) for request in batch)
    start, steps = process_time(), 0
    while all(request.block_tables for request in batch):
        engine.step()
        steps += 1
    seconds = process_time() - start
    tokens = sum(len(request.output_token_ids) for request in batch) - before
    while engine.has_work():
        engine.step()
    return seconds, tokens, steps


def engine_with(model: LoadedModel, arm: str, outputs: dict[object, list[int]]) -> Engine:
    """An engine of its own for each arm, so that no prefix is shared."""
    kind = {"draft": "draft", "ngram": "ngram"}.get(arm, "off")
    draft = bundled_model() / "draft" if kind == "draft" else None
    config = EngineConfig(speculative=kind, draft_model=draft, prefix_cache=False)
    engine = Engine(config, model)
    if arm.startswith("oracle"):
        proposer = Oracle(outputs, float(arm.split("=")[1]))
        speculation = speculation_with(
            proposer, config, engine._runner.sampler, max_model_len=engine.facts.max_model_len
        )
        engine._runner.speculation = speculation
        engine._scheduler._extend = speculation.extend
    return engine


def measure(
    arm: str, batch: int, models: dict[str, LoadedModel], prompts: list[list[int]], args: argparse.Namespace
) -> Measured:
    """Off and on in turns; the first round warms up and tells the oracle the undisturbed output."""
    model = models["draft" if arm == "draft" else "plain"]
    make = lambda members: requests(members, prompts, args.tokens, args.temperature)  # noqa: E731
    batches = [range(i, i + batch) for i in range(0, max(batch, MIN_REQUESTS), batch)]
    outputs: dict[object, list[int]] = {}
    off, on = engine_with(model, "off", {}), engine_with(model, arm, outputs)
    for members in batches:
        undisturbed = make(members)
        run(off, undisturbed)
        outputs |= {request.key: list(request.output_token_ids) for request in undisturbed}
        run(on, make(members))
    stats = on.speculation_stats
    stats.__init__()  # type: ignore[misc]
    plain_s = drafted_s = 0.0
    plain_tokens = drafted_tokens = plain_steps = drafted_steps = 0
    identical = True
    for members in batches * args.rounds:
        seconds, tokens, steps = run(off, make(members))
        plain_s, plain_tokens, plain_steps = plain_s + seconds, plain_tokens + tokens, plain_steps + steps
        drafted = make(members)
        seconds, tokens, steps = run(on, drafted)
        drafted_s, drafted_tokens, drafted_steps = (
            drafted_s + seconds, drafted_tokens + tokens, drafted_steps + steps,
        )  # fmt: skip
        identical &= all(request.output_token_ids == outputs[request.key] for request in drafted)
    length = stats.draft_tokens / max(stats.num_drafts, 1)
    rate = judged_rate(stats.accepted_by_position, stats)
    costs = on._runner.speculation._target_costs  # type: ignore[attr-defined]
    rows = costs.estimate(round(batch * (1 + length))) / costs.estimate(batch)
    share = min(stats.num_drafts / max(drafted_steps * batch, 1), 1.0)
    draft_cost = stats.draft_s / max(stats.draft_tokens / batch, 1) / (plain_s / plain_steps)
    return Measured(
        arm=arm,
        batch=batch,
        speedup=(drafted_tokens / drafted_s) / (plain_tokens / plain_s),
        acceptance=rate,
        mean_draft_length=length,
        tokens_per_step=drafted_tokens / max(drafted_steps, 1) / batch,
        predicted=predicted(rate, length, draft_cost, share),
        predicted_with_rows=predicted(rate, length, draft_cost, share, rows),
        identical=identical,
    )


def judged_rate(accepted_by_position: list[int], stats: object) -> float:
    """Accepted of those that were judged: behind a rejection nothing is."""
    accepted = sum(accepted_by_position)
    num_drafts = stats.num_drafts  # type: ignore[attr-defined]
    full = min(num_drafts, accepted_by_position[max(round(stats.draft_tokens / max(num_drafts, 1)) - 1, 0)])  # type: ignore[attr-defined]
    return accepted / max(accepted + num_drafts - full, 1)


def predicted(rate: float, length: float, draft_cost: float, share: float, rows: float = 1.0) -> float:
    """`share` of all decodes had a draft; the others give one token. `rows`: v, where all have one."""
    tokens = (1 - rate ** (length + 1)) / (1 - rate) if rate < 1 else length + 1
    return (1 - share + share * tokens) / (1 + share * (rows - 1 + length * draft_cost))


def texts(repetitive: bool) -> list[list[int]]:
    """Prompts of real source text, or of lines that come again and again."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(bundled_model() / "tokenizer.json"))
    files = [file for file in sorted(CORPUS.glob("*.py")) if file.stat().st_size > 5000]
    found = []
    for i in range(max(BATCHES)):
        ids = tokenizer.encode(files[i % len(files)].read_text()).ids
        line = ids[20:32]
        found.append((line * PROMPT_TOKENS)[:PROMPT_TOKENS] if repetitive else (ids * 9)[:PROMPT_TOKENS])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--batches", type=int, nargs="*", default=list(BATCHES))
    parser.add_argument(
        "--arms",
        nargs="*",
        default=["draft", "ngram", "oracle=0.5", "oracle=0.75", "oracle=0.9", "oracle=0.1"],
    )
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/speculation.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    draft = bundled_model() / "draft"
    models = {
        "plain": load_model(bundled_model(), EngineConfig()),
        "draft": load_model(bundled_model(), EngineConfig(speculative="draft", draft_model=draft)),
    }
    titles = ("on / off", "predicted", "with rows", "accepted", "length", "tokens/step")
    print(f"{'arm':14}{'batch':>6}" + "".join(f"{title:>13}" for title in titles) + "  same tokens")
    results = []
    for arm in args.arms:
        prompts = texts(repetitive=arm == "ngram")
        for batch in args.batches:
            row = measure(arm, batch, models, prompts, args)
            results.append(asdict(row))
            values = (
                row.speedup, row.predicted, row.predicted_with_rows, row.acceptance, row.mean_draft_length,
                row.tokens_per_step,
            )  # fmt: skip
            same = "yes" if row.identical else "NO"
            line = f"{row.arm:14}{row.batch:6}" + "".join(f"{value:13.2f}" for value in values)
            print(f"{line}  {same}", flush=True)
    print("CPU-seconds of one thread; the machine may be shared")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({"unit": "CPU-seconds", "rows": results}, indent=1))


if __name__ == "__main__":
    main()
