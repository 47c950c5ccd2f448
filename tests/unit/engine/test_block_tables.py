"""Block pool, radix tree and requests together, against a model that knows every prefix by its tokens."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from engine.block_keys import content_keys, sha256
from engine.block_tables import BlockTables
from engine.request import Request, SamplingParams

BLOCK_SIZE = 2
NUM_BLOCKS = 12
NUM_GROUPS = 2


def make_tables(num_blocks=NUM_BLOCKS, hash_function=sha256):
    return BlockTables(
        num_groups=NUM_GROUPS,
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        keys=content_keys(BLOCK_SIZE, hash_function),
    )


def make_request(tokens, *, salt=b"", prefill_only=False):
    return Request(
        key=object(),
        prompt_token_ids=list(tokens),
        sampling=SamplingParams(max_tokens=100),
        cache_salt=salt,
        prefill_only=prefill_only,
    )


def content(request, num_tokens):
    """What the KV of a block that ends there depends on."""
    return request.cache_salt, tuple(request.tokens(0, num_tokens))


def compute(tables, request):
    request.num_computed_tokens = request.num_tokens
    tables.publish(request)


def begin(tables, tokens, **options):
    """A request, admitted and computed; how many of its tokens were cached."""
    request = make_request(tokens, **options)
    tables.admit(request, request.num_tokens)
    cached = request.num_cached_tokens
    compute(tables, request)
    return request, cached


def cached_tokens(tables, tokens, **options):
    """How much of a sequence is in the cache."""
    return BLOCK_SIZE * len(tables._match(make_request(tokens, **options), len(tokens)))


class TablesMachine(RuleBasedStateMachine):
    """The model: prefixes by content with their blocks, idle prefixes in order, and each block's content."""

    hash_function = staticmethod(sha256)

    def __init__(self):
        super().__init__()
        self.tables = make_tables(hash_function=self.hash_function)
        self.live: list[Request] = []
        self.known: dict[tuple, tuple[int, ...]] = {}
        self.idle: list[tuple] = []
        self.written = [[None] * NUM_BLOCKS for _ in range(NUM_GROUPS)]

    def _blocks(self, request, position):
        return tuple(table[position] for table in request.block_tables)

    def _prefixes(self, request, num_tokens):
        return [content(request, end) for end in range(BLOCK_SIZE, num_tokens + 1, BLOCK_SIZE)]

    def _users(self, prefix):
        return sum(self.known[prefix] in zip(*request.block_tables, strict=True) for request in self.live)

    def _evict(self, num_free_needed):
        """Forget what the tables must have taken away for an allocation."""
        used = {block for request in self.live for block in request.block_tables[0]}
        free = NUM_BLOCKS - len(used | {blocks[0] for blocks in self.known.values()})
        for _ in range(max(num_free_needed - free, 0)):
            del self.known[self.idle.pop(0)]

    def _write(self, request, start, end):
        """The forward pass: the KV of a position depends on all tokens up to it."""
        for position in range(start, end):
            for group, table in enumerate(request.block_tables):
                self.written[group][table[position // BLOCK_SIZE]] = content(request, position + 1)

    def _publish(self, request):
        for position, prefix in enumerate(self._prefixes(request, request.num_computed_tokens)):
            if prefix not in self.known:
                self.known[prefix] = self._blocks(request, position)
            elif request.prefill_only and self._blocks(request, position) != self.known[prefix]:
                break
            elif prefix in self.idle:
                self.idle.remove(prefix)
        self.tables.publish(request)

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9),
        salt=st.sampled_from([b"", b"a"]),
        prefill_only=st.booleans(),
        reserved=st.booleans(),
    )
    def admit(self, tokens, salt, prefill_only, reserved):
        request = make_request(tokens, salt=salt, prefill_only=prefill_only)
        limit = len(tokens) if reserved else len(tokens) - 1
        hits = []
        for prefix in self._prefixes(request, limit):
            if prefix not in self.known:
                break
            hits.append(prefix)
        free = self.tables.num_free
        cost = -(-len(tokens) // BLOCK_SIZE) - sum(self._users(prefix) > 0 for prefix in hits)
        assert self.tables.cost(request, limit) == cost
        if cost > free:
            return
        self.idle = [prefix for prefix in self.idle if prefix not in hits]
        self._evict(-(-len(tokens) // BLOCK_SIZE) - len(hits))
        self.tables.admit(request, limit)
        self.live.append(request)
        assert self.tables.num_free == free - cost
        assert request.num_cached_tokens == request.num_computed_tokens == BLOCK_SIZE * len(hits)
        assert [self._blocks(request, n) for n in range(len(hits))] == [self.known[each] for each in hits]

    @precondition(lambda self: self.live)
    @rule(data=st.data(), chunk=st.integers(1, 9))
    def compute(self, data, chunk):
        request = data.draw(st.sampled_from(self.live))
        end = min(request.num_computed_tokens + chunk, request.num_tokens)
        self._write(request, request.num_computed_tokens, end)
        request.num_computed_tokens = end
        self._publish(request)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), token=st.integers(0, 1))
    def grow(self, data, token):
        request = data.draw(st.sampled_from(self.live))
        missing = self.tables.missing(request, request.num_tokens + 1)
        if not request.prefill_only and missing <= self.tables.num_free:
            self._evict(missing)
            request.output_token_ids.append(token)
            self.tables.grow(request, request.num_tokens)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free(self, data):
        request = data.draw(st.sampled_from(self.live))
        self.live.remove(request)
        blocks = list(zip(*request.block_tables, strict=True))
        by_blocks = {block_ids: prefix for prefix, block_ids in self.known.items()}
        self.idle += [
            by_blocks[block_ids]
            for block_ids in reversed(blocks)
            if block_ids in by_blocks and not self._users(by_blocks[block_ids])
        ]
        self.tables.free(request)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def retract(self, data):
        request = data.draw(st.sampled_from(self.live))
        salt, first = content(request, BLOCK_SIZE)
        if self.known.get((salt, first)) == self._blocks(request, 0):
            family = [(s, t) for s, t in self.known if s == salt and t[:BLOCK_SIZE] == first]
            for prefix in family:
                del self.known[prefix]
            self.idle = [prefix for prefix in self.idle if prefix not in family]
        self.tables.retract(request)

    @invariant()
    def agrees_with_the_model(self):
        self.tables.check(self.live)
        used = Counter(block for request in self.live for block in set(request.block_tables[0]))
        assert self.tables.num_used == len(used)
        assert self.tables.num_cached == len(self.idle)
        assert self.tables.num_used + self.tables.num_cached + self.tables.pools[0].num_free == NUM_BLOCKS
        for group, pool in enumerate(self.tables.pools):
            assert pool.kept() == {block_ids[group] for block_ids in self.known.values()}
            for prefix, block_ids in self.known.items():
                assert self.written[group][block_ids[group]] == prefix

    @invariant()
    def nobody_has_lost_what_was_computed(self):
        for request in self.live:
            for position, prefix in enumerate(self._prefixes(request, request.num_computed_tokens)):
                for group, block in enumerate(self._blocks(request, position)):
                    assert self.written[group][block] == prefix


class CollidingMachine(TablesMachine):
    """With a hash of 3 bits some content is never cached; what is found must still be right."""

    hash_function = staticmethod(lambda content: bytes([sha256(content)[0] & 7]))

    def _publish(self, request):
        self.tables.publish(request)

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9), salt=st.sampled_from([b"", b"a"]))
    def admit(self, tokens, salt):
        request = make_request(tokens, salt=salt)
        if self.tables.cost(request, len(tokens)) <= self.tables.num_free:
            self.tables.admit(request, len(tokens))
            self.live.append(request)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free(self, data):
        self.tables.free(self.live.pop(data.draw(st.integers(0, len(self.live) - 1))))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def retract(self, data):
        self.tables.retract(data.draw(st.sampled_from(self.live)))

    def _evict(self, num_free_needed):
        pass

    @invariant()
    def agrees_with_the_model(self):
        self.tables.check(self.live)


def budget(max_examples):
    return settings(
        max_examples=max_examples, stateful_step_count=12, derandomize=True, deadline=None, database=None
    )


@pytest.mark.parametrize("machine", [TablesMachine, CollidingMachine])
def test_any_order_of_operations(machine):
    run_state_machine_as_test(machine, settings=budget(200))


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("machine", [TablesMachine, CollidingMachine])
def test_ten_thousand_orders_of_operations(machine):
    run_state_machine_as_test(machine, settings=budget(10_000))


def test_the_prefix_that_was_used_least_recently_goes_first():
    tables = make_tables(num_blocks=6)
    old, new = [1, 1, 1, 1], [2, 2, 2, 2]
    for tokens in (old, new):
        tables.free(begin(tables, tokens)[0])
    tables.free(begin(tables, old)[0])
    tables.free(begin(tables, [3] * 6)[0])
    assert cached_tokens(tables, new) == 2, "its last block went, its first one is still of use"
    assert cached_tokens(tables, old) == 4
    assert tables.stats.evicted_blocks == 1


def test_shared_blocks_stay_as_long_as_one_request_uses_them():
    tables = make_tables(num_blocks=6)
    first, _ = begin(tables, [1, 1, 1, 1, 1, 1])
    second, cached = begin(tables, [1, 1, 1, 1, 2, 2])
    assert cached == 4
    assert tables.num_used == 4
    tables.free(first)
    tables.check([second])
    assert (tables.num_used, tables.num_cached) == (3, 1)
    tables.free(begin(tables, [3] * 6)[0])
    assert cached_tokens(tables, [1, 1, 1, 1, 2, 2]) == 6
    assert cached_tokens(tables, [1, 1, 1, 1, 1, 1]) == 4


def test_salts_do_not_share():
    tables = make_tables()
    begin(tables, [1, 1, 1, 1], salt=b"one")
    assert cached_tokens(tables, [1, 1, 1, 1], salt=b"two") == 0
    assert cached_tokens(tables, [1, 1, 1, 1]) == 0
    assert cached_tokens(tables, [1, 1, 1, 1], salt=b"one") == 4


def test_a_late_equal_request_changes_over_unless_its_blocks_are_being_read():
    tables = make_tables()
    twins = [make_request([1, 1, 1, 1]) for _ in range(2)]
    reader = make_request([1, 1, 1, 1, 2, 2], prefill_only=True)
    for request in (*twins, reader):
        tables.admit(request, request.num_tokens)
    before = [list(table) for table in reader.block_tables]
    for request in (*twins, reader):
        compute(tables, request)
    assert twins[0].block_tables == twins[1].block_tables
    assert reader.block_tables == before
    assert tables.num_used == 2 + 3
    assert cached_tokens(tables, [1, 1, 1, 1, 2, 2]) == 4
    tables.check([*twins, reader])


def test_what_is_not_computed_is_not_found():
    tables = make_tables()
    request = make_request([1, 1, 1, 1, 1])
    tables.admit(request, 5)
    assert cached_tokens(tables, [1, 1, 1, 1]) == 0
    request.num_computed_tokens = 3
    tables.publish(request)
    assert cached_tokens(tables, [1, 1, 1, 1]) == 2


def test_without_keys_nothing_is_kept():
    tables = BlockTables(num_groups=1, num_blocks=4, block_size=2)
    request, _ = begin(tables, [1, 1, 1, 1])
    tables.free(request)
    assert (tables.num_free, tables.num_cached) == (4, 0)
    assert begin(tables, [1, 1, 1, 1])[1] == 0


def test_after_a_fault_those_who_shared_publish_anew():
    tables = make_tables()
    healthy, _ = begin(tables, [1, 1, 1, 1])
    faulty, cached = begin(tables, [1, 1, 2, 2])
    assert cached == 2
    tables.retract(faulty)
    tables.check([healthy, faulty])
    assert cached_tokens(tables, [1, 1, 1, 1]) == 0
    tables.free(faulty)
    healthy.output_token_ids += [1, 1]
    tables.grow(healthy, 6)
    compute(tables, healthy)
    tables.check([healthy])
    assert cached_tokens(tables, [1, 1, 1, 1, 1, 1]) == 6
