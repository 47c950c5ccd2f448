"""A preempted request goes on as if nothing had happened, whatever became of its KV."""

from collections import Counter

import pytest
import torch

from engine.host_kv import HostKv
from engine.outputs import PreemptionMode
from engine.request import RequestState

LENS = (9, 20, 14, 5)

MODES = {
    "swap": ({"preemption_mode": "swap"}, {PreemptionMode.SWAP}),
    "recompute": ({"preemption_mode": "recompute"}, {PreemptionMode.RECOMPUTE}),
    "room for one": ({"swap_space_bytes": 8 * 1024}, {PreemptionMode.SWAP, PreemptionMode.RECOMPUTE}),
    "no swap space": ({"swap_space_bytes": 0}, {PreemptionMode.RECOMPUTE}),
}
"""A block of 4 tokens has 1024 bytes."""


def drive(engine, requests, *, late=()):
    """Step to the end; (tokens and logprobs of each request, preemptions by mode). `late` come at step 4."""
    for request in requests:
        engine.submit(request)
    said = {request.key: [] for request in (*requests, *late)}
    modes = Counter()
    num_steps = 0
    while engine.has_work():
        result = engine.step()
        modes.update(item.mode for item in result.preempted)
        for output in result.outputs:
            said[output.request.key] += [*output.token_ids, *(each.logprob for each in output.logprobs)]
        num_steps += 1
        if num_steps == 4:
            for request in late:
                engine.submit(request)
    load = engine.load()
    assert (load.blocks_used, load.blocks_swapped) == (0, 0)
    return [value for values in said.values() for value in values], modes


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("name", MODES)
def test_preemption_changes_no_token_and_no_logprob(make_engine, make_request, name, temperature):
    def requests():
        return [make_request(n, max_tokens=40, logprobs=2, temperature=temperature) for n in LENS]

    overrides, expected = MODES[name]
    undisturbed, none = drive(make_engine(num_blocks=128), requests())
    said, modes = drive(make_engine(num_blocks=24, **overrides), requests())
    # Computed again, a token's KV may differ in its last bit from what decoding it gave.
    exact = expected == {PreemptionMode.SWAP}
    assert said == (undisturbed if exact else pytest.approx(undisturbed, abs=1e-5))
    assert not none
    assert set(modes) == expected


@pytest.mark.parametrize("policy", ["priority", "mlfq"])
def test_policies_change_no_token(make_engine, make_request, policy):
    def requests():
        made = [make_request(n, max_tokens=24, logprobs=2) for n in (*LENS, 3, 30)]
        for request in made:
            request.priority = len(request.prompt_token_ids) % 3
        return made

    undisturbed, _ = drive(make_engine(num_blocks=128), requests())
    made, engine = requests(), make_engine(num_blocks=26, max_num_seqs=3, scheduling_policy=policy)
    said, modes = drive(engine, made[:4], late=made[4:])
    assert said == undisturbed
    assert modes[PreemptionMode.SWAP]


def test_a_swapped_request_comes_back_without_being_computed_again(make_engine, make_request):
    engine = make_engine(num_blocks=24, preemption_mode="swap")
    requests = [make_request(n, max_tokens=40) for n in LENS]
    for request in requests:
        engine.submit(request)
    swapped = set()
    while engine.has_work():
        before = {each: (each.state, each.num_computed_tokens) for each in requests}
        engine.step()
        for each, (state, num_computed) in before.items():
            if state is RequestState.SWAPPED and each.state is RequestState.RUNNING:
                assert each.num_computed_tokens == num_computed + 1
                swapped.add(each)
    assert swapped


def test_abort_of_a_swapped_request_frees_its_slots(make_engine, make_request):
    engine = make_engine(num_blocks=24, preemption_mode="swap")
    requests = [make_request(n, max_tokens=40) for n in LENS]
    for request in requests:
        engine.submit(request)
    while not engine.load().blocks_swapped:
        engine.step()
    (swapped,) = (each for each in requests if each.state is RequestState.SWAPPED)
    assert engine.load().requests_waiting == 1
    assert engine.abort(swapped.key)
    assert engine.load().blocks_swapped == 0


def commit_all(engine, requests):
    for request in requests:
        for group in engine.kv_cache.groups:
            group[:, :, request.block_tables[0]] = 0.0
        engine.commit(request, 5, None)


def test_what_neither_host_nor_a_step_holds_is_handed_back(make_engine, make_request):
    """Only what another worker has prefilled: the first of the two was computed here."""
    engine = make_engine(num_blocks=24, max_num_batched_tokens=16, swap_space_bytes=0)
    local, transferred = make_request(30, max_tokens=60), make_request(41, max_tokens=50)
    engine.submit(local)
    engine.step()
    engine.step()
    assert engine.reserve(transferred)
    commit_all(engine, [transferred])
    preempted = []
    while engine.has_work():
        preempted += engine.step().preempted
    assert [(item.request, item.mode) for item in preempted] == [(transferred, PreemptionMode.HAND_BACK)]
    assert transferred.state is RequestState.FINISHED
    assert 1 < len(transferred.output_token_ids) < 50
    assert len(local.output_token_ids) == 60


@pytest.mark.parametrize("mode", ["auto", "swap", "recompute"])
def test_all_blocks_in_transfers_and_running_requests_still_complete(make_engine, make_request, mode):
    """The running ones must grow, the transfers hold the rest: both sides get to their ends."""
    engine = make_engine(num_blocks=24, preemption_mode=mode, swap_space_bytes=8 * 1024)
    running = [make_request(n, max_tokens=30) for n in (7, 8)]
    for request in running:
        engine.submit(request)
    engine.step()
    transfers = [make_request(n, max_tokens=30) for n in (28, 24, 19, 3)]
    reserved = [request for request in transfers if engine.reserve(request)]
    assert len(reserved) == 3
    for _ in range(8):
        engine.step()
    assert engine.load().blocks_used >= 18
    tables = [list(request.block_tables[0]) for request in reserved]
    for _ in range(30):
        engine.step()
    assert tables == [request.block_tables[0] for request in reserved], "transfers keep their blocks"
    commit_all(engine, reserved)
    while engine.has_work():
        engine.step()
    assert all(request.state is RequestState.FINISHED for request in (*running, *reserved))
    assert engine.load().blocks_used == 0


def test_blocks_of_several_slabs_come_back_bit_by_bit(monkeypatch):
    monkeypatch.setattr("engine.host_kv.SLAB_BYTES", 3 * 2 * 2 * 4 * 2 * 8 * 4)
    generator = torch.Generator().manual_seed(0)
    groups = [torch.randn((2, 2, 20, 4, 2, 8), generator=generator) for _ in range(2)]
    before = [group.clone() for group in groups]
    host = HostKv(groups, 10)
    taken, given = [7, 3, 19, 0, 12, 5, 6, 1], [2, 4, 6, 8, 10, 11, 13, 14]
    slots = [9, 0, 3, 4, 5, 1, 2, 7]
    host.store([taken, taken[::-1]], slots)
    for group in groups:
        group.fill_(torch.nan)
    host.load(slots, [given, given])
    for group, old, table in zip(groups, before, (taken, taken[::-1]), strict=True):
        assert torch.equal(group[:, :, given], old[:, :, table])
        rest = [block for block in range(20) if block not in given]
        assert group[:, :, rest].isnan().all()
