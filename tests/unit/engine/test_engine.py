import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from engine.config import EngineConfig
from engine.engine import Engine
from engine.loader import LoadedModel, load_model
from engine.request import FinishReason, RequestState, TokenLogprob
from kernels import ops
from runtime.errors import ContextLengthExceeded, InvalidRequest, StartupError

PROMPT_LENS = (1, 3, 4, 5, 16, 17, 30, 41)


@pytest.fixture(scope="module")
def naive(checkpoint):
    """Logits [num_tokens, vocab_size] of a Llama without cache, batch or paging, from the tensors by name."""
    w = load_file(checkpoint / "model.safetensors")

    def norm(x, name):
        return F.rms_norm(x, (32,), w[name], 1e-5)

    def turn(x):
        angles = torch.arange(len(x))[:, None] / 10_000.0 ** (torch.arange(0, 8, 2) / 8)
        rotation = torch.polar(torch.ones_like(angles), angles)[:, None]
        rotated = torch.complex(x[..., :4], x[..., 4:]) * rotation
        return torch.cat((rotated.real, rotated.imag), -1)

    def attend(x, p):
        q, k, v = (F.linear(x, w[f"{p}.{n}_proj.weight"]).view(len(x), -1, 8) for n in "qkv")
        k, v = turn(k).repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = torch.einsum("qhd,khd->hqk", turn(q), k) / 8**0.5
        hidden = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        probs = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return F.linear(torch.einsum("hqk,khd->qhd", probs, v).flatten(1), w[f"{p}.o_proj.weight"])

    def logits(token_ids):
        x = w["model.embed_tokens.weight"][torch.tensor(token_ids)]
        for i in range(2):
            p = f"model.layers.{i}"
            x = x + attend(norm(x, f"{p}.input_layernorm.weight"), f"{p}.self_attn")
            h = norm(x, f"{p}.post_attention_layernorm.weight")
            gate, up = (F.linear(h, w[f"{p}.mlp.{n}_proj.weight"]) for n in ("gate", "up"))
            x = x + F.linear(F.silu(gate) * up, w[f"{p}.mlp.down_proj.weight"])
        return F.linear(norm(x, "model.norm.weight"), w["lm_head.weight"])

    return logits


@pytest.fixture
def oracle(naive):
    """Tokens of a request by the naive loop, with the definition of sampling written out."""

    def tokens(request):
        params, sequence = request.sampling, list(request.prompt_token_ids)
        for _ in range(params.max_tokens):
            scores = naive(sequence)[-1]
            if params.temperature > 0:
                key = [torch.tensor([x]) for x in (params.seed, len(sequence), request.choice)]
                scores = scores / params.temperature + ops.gumbel_noise(*key, 61)[0]
            sequence.append(int(scores.argmax()))
        return sequence[len(request.prompt_token_ids) :]

    return tokens


def transfer(source, target, request, reserved):
    """By hand what a link does: chunks of blocks and layers through a slab."""
    slab = torch.empty(1 << 14, dtype=torch.uint8)
    for ours, theirs, table, other in zip(
        source.kv_cache.groups,
        target.kv_cache.groups,
        request.block_tables,
        reserved.block_tables,
        strict=True,
    ):
        for first in range(0, len(table), 3):
            for layer in range(2):
                num_bytes = ops.gather_blocks(ours, table[first : first + 3], layer, 1, slab)
                assert ops.scatter_blocks(theirs, other[first : first + 3], layer, 1, slab) == num_bytes


def test_a_mixed_batch_gives_the_tokens_of_the_naive_loop(make_engine, make_request, oracle):
    requests = [make_request(n, temperature=0.0 if n % 2 else 1.1) for n in PROMPT_LENS]
    assert make_engine().run(*requests) == [oracle(request) for request in requests]


def test_a_mixed_batch_gives_the_tokens_of_each_request_alone(make_engine, make_request):
    together = make_engine(num_blocks=128).run(*map(make_request, PROMPT_LENS))
    engine = make_engine()
    assert together == [engine.run(make_request(n))[0] for n in PROMPT_LENS]


def test_a_request_has_the_same_bits_alone_and_in_a_batch(make_engine, make_request):
    def logprobs(engine, *prompt_lens):
        for prompt_len in prompt_lens:
            engine.submit(make_request(prompt_len, logprobs=2))
        found = {prompt_len: [] for prompt_len in prompt_lens}
        while engine.has_work():
            for output in engine.step().outputs:
                found[output.request.key] += output.logprobs
        return found

    together = logprobs(make_engine(num_blocks=128), *PROMPT_LENS)
    for prompt_len in PROMPT_LENS:
        assert logprobs(make_engine(), prompt_len) == {prompt_len: together[prompt_len]}


@pytest.mark.parametrize("budget", [4, 7, 16])
def test_chunked_prefill_changes_no_token(make_engine, make_request, budget):
    whole = make_engine(num_blocks=128).run(*map(make_request, PROMPT_LENS))
    assert make_engine(max_num_batched_tokens=budget).run(*map(make_request, PROMPT_LENS)) == whole


def test_a_migrated_request_goes_on_with_the_same_tokens(make_engine, make_request):
    (undisturbed,) = make_engine().run(make_request(9, repetition_penalty=1.3, min_tokens=8))
    for emitted in (1, 5, 11):
        request = make_request(9, outputs=undisturbed[:emitted], repetition_penalty=1.3, min_tokens=8)
        assert make_engine().run(request) == [undisturbed]


@pytest.mark.parametrize("emitted", [0, 3])
def test_split_engines_give_the_tokens_of_one(make_engine, make_request, emitted):
    undisturbed = make_engine(num_blocks=128).run(*map(make_request, PROMPT_LENS))
    prefill, decode = make_engine(max_num_batched_tokens=8), make_engine(num_blocks=128, max_num_seqs=16)
    for prompt_len, whole in zip(PROMPT_LENS, undisturbed, strict=True):
        request = make_request(prompt_len, outputs=whole[:emitted], prefill_only=True)
        reserved = make_request(prompt_len, outputs=whole[:emitted])
        prefill.submit(request)
        assert decode.reserve(reserved)
        progress = []
        while prefill.has_work():
            result = prefill.step()
            progress += [each.num_computed_tokens for each in result.computed]
            decode.step()
        assert progress == [*range(8, prompt_len + emitted, 8), prompt_len + emitted]
        (output,) = result.outputs
        assert request.state is RequestState.HELD
        transfer(prefill, decode, request, reserved)
        committed = decode.commit(reserved, output.token_ids[0], None)
        assert (committed.start_index, committed.token_ids) == (emitted, output.token_ids)
        prefill.release(request.key)
        prefill.release(request.key)
        assert prefill.load().blocks_used == 0
        decode.step()
        assert reserved.output_token_ids == whole[: emitted + 2]
    while decode.has_work():
        decode.step()
    assert decode.load().blocks_used == 0


def test_a_first_token_that_ends_the_request_frees_its_reservation(make_engine, make_request):
    engine = make_engine()
    request = make_request(5, max_tokens=1)
    assert engine.reserve(request)
    assert engine.load().blocks_used == 2
    output = engine.commit(request, 7, TokenLogprob(-1.0, ()))
    assert output.finish_reason is FinishReason.LENGTH
    assert output.logprobs == (TokenLogprob(-1.0, ()),)
    assert engine.load().blocks_used == 0
    assert not engine.has_work()


def test_a_committed_end_token_before_min_tokens_does_not_end(make_engine, make_request):
    engine = make_engine()
    request = make_request(5, min_tokens=1, ignore_eos=False)
    assert engine.reserve(request)
    assert engine.commit(request, 2, None).finish_reason is None
    assert engine.has_work()


def test_abort_frees_blocks_in_every_state(make_engine, make_request):
    engine = make_engine(num_blocks=24, max_num_batched_tokens=6)
    running, held = make_request(5), make_request(6, prefill_only=True)
    reserved, waiting, chunked = make_request(7), make_request(41), make_request(20)
    engine.submit(running)
    engine.step()
    engine.submit(held)
    engine.step()
    engine.step()
    engine.reserve(reserved)
    engine.submit(chunked)
    engine.step()
    engine.submit(waiting)
    engine.step()
    requests = (running, held, reserved, chunked, waiting)
    assert [request.state.name for request in requests] == [
        "RUNNING", "HELD", "RESERVED", "PREFILLING", "WAITING",
    ]  # fmt: skip
    for request in requests:
        used = engine.load().blocks_used
        held_blocks = sum(map(len, request.block_tables))
        assert engine.abort(request.key)
        assert engine.load().blocks_used == used - held_blocks
        assert not engine.abort(request.key)
    assert engine.load().blocks_used == 0
    assert not engine.has_work()


def test_a_request_with_nan_fails_alone_and_leaves_no_trace(
    checkpoint, make_engine, make_request, tiny_model
):
    alone = make_engine().run(make_request(6))[0]
    poisoned = load_model(checkpoint, EngineConfig())
    poisoned.module.embed.weight[60] = torch.nan
    engine = make_engine(num_blocks=24)
    engine._runner._module = poisoned.module
    bad, good = make_request(9, logit_bias={60: -100.0}), make_request(6, logit_bias={60: -100.0})
    bad.prompt_token_ids[4] = 60
    engine.submit(bad)
    engine.submit(good)
    outputs = {output.request.key: output for output in engine.step().outputs}
    assert outputs[9].finish_reason is FinishReason.ERROR
    assert "not finite" in outputs[9].error
    assert outputs[9].token_ids == ()
    while engine.has_work():
        engine.step()
    assert good.output_token_ids == alone
    assert engine.run(*(make_request(n, key=n, logit_bias={60: -100.0}) for n in (6, 6 + 24)))[0] == alone


@pytest.mark.parametrize(
    ("params", "reason", "stop_token_id", "num_tokens"),
    [
        ({"max_tokens": 5}, FinishReason.LENGTH, None, 5),
        ({"max_tokens": 400}, FinishReason.LENGTH, None, 96 - 5),
        ({"logit_bias": {9: 100.0}, "stop_token_ids": (9,)}, FinishReason.STOP, 9, 1),
        ({"logit_bias": {9: 100.0}, "stop_token_ids": (9,), "min_tokens": 4}, FinishReason.STOP, 9, 5),
        ({"logit_bias": {2: 100.0}, "ignore_eos": False}, FinishReason.STOP, 2, 1),
        ({"logit_bias": {2: 100.0}, "ignore_eos": False, "min_tokens": 3}, FinishReason.STOP, 2, 4),
        ({"logit_bias": {2: 100.0}, "min_tokens": 3}, FinishReason.LENGTH, None, 12),
    ],
)
def test_finish_rules(make_engine, make_request, params, reason, stop_token_id, num_tokens):
    engine = make_engine()
    request = make_request(5, **params)
    engine.submit(request)
    while engine.has_work():
        (output,) = engine.step().outputs
    assert (output.finish_reason, output.stop_token_id) == (reason, stop_token_id)
    assert len(request.output_token_ids) == num_tokens
    assert output.start_index == num_tokens - 1
    assert request.state is RequestState.FINISHED


def test_choices_of_one_prompt_draw_different_tokens(make_engine, make_request):
    requests = [make_request(5, key=choice, choice=choice) for choice in range(3)]
    assert len({tuple(tokens) for tokens in make_engine().run(*requests)}) == 3


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [61]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"outputs": [99]}, "prompt"),
        ({"outputs": [1] * 12}, "max_tokens"),
        ({"stop_token_ids": (61,)}, "stop_token_ids"),
        ({"logit_bias": {-1: 0.0}}, "logit_bias"),
    ],
)
@pytest.mark.parametrize("entry", ["submit", "reserve"])
def test_a_request_that_would_harm_others_is_refused(make_engine, make_request, change, field, entry):
    engine = make_engine()
    request = make_request(4, **{name: value for name, value in change.items() if name != "prompt"})
    request.prompt_token_ids = change.get("prompt", request.prompt_token_ids)
    with pytest.raises(InvalidRequest) as caught:
        getattr(engine, entry)(request)
    assert caught.value.field == field
    assert engine.load().requests_waiting == 0


def test_a_prompt_must_leave_room_for_a_token(make_engine, make_request):
    with pytest.raises(ContextLengthExceeded):
        make_engine().submit(make_request(96))
    assert len(make_engine().run(make_request(95))[0]) == 1


def test_load_counts_requests_tokens_and_blocks(make_engine, make_request):
    engine = make_engine(max_num_batched_tokens=10)
    for prompt_len in (5, 30, 6):
        engine.submit(make_request(prompt_len))
    load = engine.load()
    assert (load.requests_running, load.requests_waiting, load.queued_prefill_tokens) == (0, 3, 41)
    engine.step()
    load = engine.load()
    assert (load.requests_running, load.requests_waiting, load.queued_prefill_tokens) == (2, 1, 31)
    assert (load.blocks_total, load.blocks_used, load.blocks_cached) == (64, 10, 0)


def test_a_pool_must_hold_one_longest_request(tiny_model: LoadedModel):
    with pytest.raises(StartupError, match="--kv-cache-memory"):
        Engine(EngineConfig(num_blocks=5, block_size=16), tiny_model)
    Engine(EngineConfig(num_blocks=6, block_size=16), tiny_model).check()
    bytes_per_token = 2 * 2 * 2 * 8 * 4
    config = EngineConfig(kv_cache_memory_bytes=100 * bytes_per_token, block_size=1)
    assert Engine(config, tiny_model).load().blocks_total == 100


def test_kv_groups_have_the_shape_of_the_contract(make_engine):
    (group,) = make_engine(num_blocks=40).kv_cache.groups
    assert group.shape == (2, 2, 40, 4, 2, 8)
    assert group.is_contiguous()
