"""Structured output on a toy vocabulary: every token one character, or a few."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from engine.request import Request, SamplingParams
from engine.sampler import NO_TOKEN, Sampler
from engine.structured import Constraint, Grammars, fill_masks
from runtime.errors import InvalidRequest
from runtime.grammars import Grammar

TEXTS = ["<end>", *(chr(code) for code in range(32, 127)), '{"', '":', "true", "ab", "yes", "no"]
VOCAB, EOS = len(TEXTS) + 5, 0
"""The model has a few more rows than the tokenizer has tokens."""


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    vocab = {text.replace(" ", "\u0120"): token_id for token_id, text in enumerate(TEXTS)}
    tokenizer = Tokenizer(models.BPE(vocab, merges=[]))
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    path = tmp_path_factory.mktemp("toy") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture
def grammars(tokenizer_file):
    return Grammars(tokenizer_file, vocab_size=VOCAB, eos_token_ids=(EOS,), max_grammars=3)


def ids_of(text):
    return [TEXTS.index(character) for character in text]


def text_of(token_ids):
    return "".join(TEXTS[token_id] for token_id in token_ids if token_id != EOS)


def bits(constraint):
    """Tokens that may follow."""
    mask = np.empty((1, -(-VOCAB // 32)), dtype=np.int32)
    fill_masks([constraint], mask)
    return {token_id for token_id in range(VOCAB) if mask[0, token_id // 32] >> (token_id % 32) & 1}


def make_request(grammar, outputs=(), **sampling):
    params = {"max_tokens": 60, "temperature": 1.0, "grammar": grammar, **sampling}
    return Request(
        key=0, prompt_token_ids=[5], output_token_ids=list(outputs), sampling=SamplingParams(**params)
    )


def generate(sampler, requests, num_steps=60, seed=0):
    """A batch on random logits, without an engine; ends a request as the engine does."""
    live = list(requests)
    for step in range(num_steps):
        rows = torch.stack([logits_at(seed, request, step) for request in live])
        for request, sample in zip(tuple(live), sampler.sample(rows, live), strict=True):
            assert sample.error is None
            request.output_token_ids.append(sample.token_id)
            if sample.token_id == EOS or sampler.completes(request):
                live.remove(request)
        if not live:
            return


def logits_at(seed, request, step):
    generator = torch.Generator().manual_seed(1000 * seed + 100 * request.sampling.seed + step)
    return 2 * torch.randn(VOCAB, generator=generator)


GRAMMARS = {
    "regex": Grammar("regex", "(ab|[0-9]{2})*!"),
    "choice": Grammar("choice", json.dumps(["yes", "no", 'say "no"', "\\d"])),
    "json": Grammar(
        "json_schema",
        json.dumps(
            {
                "type": "object",
                "properties": {"a": {"type": "boolean"}, "b": {"enum": ["x", 7]}},
                "required": ["a", "b"],
                "additionalProperties": False,
                "x-guidance": {"whitespace_flexible": False},
            }
        ),
    ),
    "lark": Grammar("grammar", 'start: "a" start "b" | "-"'),
    "gbnf": Grammar("grammar", 'root ::= "(" root ")" | "+"'),
}


def test_what_may_follow_a_regex(grammars):
    constraint = grammars.start(Grammar("regex", "a(b|bc)"))
    # Where one text is forced, it is spelled as the tokenizer spells it.
    assert bits(constraint) == {TEXTS.index("a")}
    constraint.catch_up(ids_of("a"))
    assert bits(constraint) == {TEXTS.index("b")}
    constraint.catch_up(ids_of("ab"))
    assert bits(constraint) == {TEXTS.index("c"), EOS}
    assert not constraint.complete
    constraint.catch_up(ids_of("abc"))
    assert constraint.complete
    assert bits(constraint) == {EOS}


def test_tokens_outside_the_grammar_leave_nothing(grammars):
    constraint = grammars.start(Grammar("regex", "a*"))
    constraint.catch_up(ids_of("az"))
    assert constraint.failed
    assert not constraint.complete
    assert bits(constraint) == set()


@pytest.mark.parametrize("name", GRAMMARS)
def test_every_text_is_in_its_grammar_and_its_mask_is_brute_force(grammars, name):
    """The oracle replays the text from its start for each step and looks at every token."""
    sampler = Sampler((EOS,), VOCAB, grammars)
    request = make_request(GRAMMARS[name], temperature=0)
    for step in range(20):
        fresh = grammars.start(GRAMMARS[name])
        fresh.catch_up(request.output_token_ids)
        logits = logits_at(3, request, step)
        allowed = sorted(bits(fresh))
        assert fresh.matcher.validate_tokens(allowed[:1]) == 1
        want = max(allowed, key=lambda token_id: (float(logits[token_id]), -token_id))
        assert sampler.sample(logits[None], [request])[0].token_id == want
        request.output_token_ids.append(want)
        if want == EOS or sampler.completes(request):
            break
    fresh = grammars.compile(GRAMMARS[name]).deep_copy()
    assert fresh.consume_tokens([token_id for token_id in request.output_token_ids if token_id != EOS])


def test_a_batch_of_constrained_and_free_rows_equals_lone_runs(grammars, tokenizer_file):
    large = Grammars(tokenizer_file, vocab_size=VOCAB, eos_token_ids=(EOS,))

    def batch():
        specs = [*GRAMMARS.values(), None, None]
        return [
            make_request(grammar, seed=seed, allowed_token_ids=tuple(range(40)) if grammar is None else ())
            for seed, grammar in enumerate(specs)
        ]

    together, alone = batch(), batch()
    generate(Sampler((EOS,), VOCAB, large), together)
    for request in alone:
        # Three grammars fit: evicted ones are compiled again.
        generate(Sampler((EOS,), VOCAB, grammars), [request])
    assert [each.output_token_ids for each in together] == [each.output_token_ids for each in alone]
    assert text_of(together[1].output_token_ids) in json.loads(GRAMMARS["choice"].text)
    assert set(json.loads(text_of(together[2].output_token_ids))) == {"a", "b"}


@pytest.mark.parametrize("name", GRAMMARS)
def test_a_request_that_moves_goes_on_inside_its_grammar(grammars, name):
    undisturbed = make_request(GRAMMARS[name], seed=4)
    generate(Sampler((EOS,), VOCAB, grammars), [undisturbed])
    want = undisturbed.output_token_ids
    for num_emitted in range(1, len(want)):
        sampler = Sampler((EOS,), VOCAB, grammars)
        moved = make_request(GRAMMARS[name], outputs=want[:num_emitted], seed=4)
        logits = logits_at(0, moved, num_emitted)
        assert sampler.sample(logits[None], [moved])[0].token_id == want[num_emitted]


def test_a_grammar_and_another_limit_that_exclude_each_other_fail_the_row_alone(grammars):
    stuck = make_request(Grammar("regex", "[0-9]+"), allowed_token_ids=tuple(ids_of("ab")))
    free = make_request(None)
    samples = Sampler((EOS,), VOCAB, grammars).sample(torch.zeros(2, VOCAB), [stuck, free])
    assert [sample.error for sample in samples] == [NO_TOKEN, None]


def test_grammars_are_kept_up_to_a_number(grammars):
    kept = [Grammar("regex", f"a{{{count}}}") for count in range(1, 5)]
    first = grammars.compile(kept[0])
    for grammar in kept[1:3]:
        grammars.compile(grammar)
    assert grammars.compile(kept[0]) is first
    grammars.compile(kept[3])
    assert [grammar in grammars for grammar in kept] == [True, False, True, True]


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("json_schema", "{"),
        Grammar("json_schema", '{"type": "nonsense"}'),
        Grammar("json_schema", '{"type":"array","items":' * 30_000 + "{}" + "}" * 30_000),
        Grammar("regex", "(a"),
        Grammar("regex", "(" * 30_000 + "a" + ")" * 30_000),
        Grammar("grammar", "start: nowhere"),
        Grammar("grammar", "root ::= " + "(" * 5_000 + '"a"' + ")" * 5_000),
    ],
    ids=lambda grammar: f"{grammar.kind}-{grammar.text[:12]}",
)
def test_a_bad_grammar_names_the_field(grammars, grammar):
    with pytest.raises(InvalidRequest) as caught:
        grammars.compile(grammar)
    assert caught.value.field == "structured_output"
    assert len(caught.value.message) < 400
    assert grammar not in grammars


def test_a_tokenizer_that_is_missing_is_the_models_fault(tmp_path):
    grammars = Grammars(tmp_path / "tokenizer.json", vocab_size=VOCAB, eos_token_ids=(EOS,))
    with pytest.raises(InvalidRequest, match="not available for this model"):
        grammars.compile(Grammar("regex", "a"))


def test_a_constraint_catches_up_with_many_tokens_at_once_or_one_by_one(grammars):
    slow, fast = (grammars.start(Grammar("regex", "[a-z]*!")) for _ in range(2))
    tokens = ids_of("abcxyz!")
    for end in range(len(tokens) + 1):
        slow.catch_up(tokens[:end])
    fast.catch_up(tokens)
    assert isinstance(slow, Constraint)
    assert slow.complete
    assert fast.complete
