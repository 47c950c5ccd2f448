"""The ranks that compute one model together, as the engine on rank 0 sees them."""

from collections.abc import Callable, Sequence
from typing import Protocol

from engine.kv_pool import KvPool, LocalKvPool
from engine.models.decoder import Decoder
from engine.models.llama import Llama
from engine.parallel.shard import Shard
from engine.parallel.wire import Channel, Ints, Message, Op
from engine.step.spec import StepSpec
from engine.step.step_ranks import Alone, StepRanks


class Ranks(Protocol):
    """Rank 0 decides and samples; what touches weights or KV is done by all ranks, in the same order."""

    shard: Shard
    """Of this process."""

    def lead_model(self, module: Llama, vocab_size: int) -> Decoder:
        """The whole model, of which `module` is this rank's shard."""
        ...

    def lead_pool(self, pool: LocalKvPool) -> KvPool:
        """The pool with all heads, of which `pool` holds this rank's; groups behind the first are whole."""
        ...

    def connect(self, rank: int, link: int) -> Channel:
        """A channel to another rank for one KV link, which serves it until its end. Raises RankLost."""
        ...

    def tell(self, op: Op, *arrays: Sequence[int] | Ints) -> None:
        """One message to every other rank, in the order of the engine thread's calls. Raises RankLost."""
        ...

    def answers(self, op: Op) -> list[Message]:
        """What every other rank answers to the last message. Raises RankLost."""
        ...

    def call_roll(self) -> None:
        """RankLost if another rank does not answer in time. On the engine thread."""
        ...

    def lead_steps(self, module: Decoder, spec: StepSpec) -> StepRanks:
        """The steps of that kind over `lead_model`'s module and the newest pool; at most one kind."""
        ...

    def confirm(self) -> None:
        """RankLost unless everything that has been read of a device by now was computed by all ranks."""
        ...

    def watch(self, on_lost: Callable[[str], None]) -> None:
        """Call `on_lost` with the reason, once and from any thread, when another rank ends or hangs.

        From here on ranks have RANK_TIMEOUT_S for what they are asked to do."""
        ...

    def close(self) -> None:
        """End the other ranks."""
        ...


class OneRank:
    """The whole model in this process."""

    shard = Shard()

    def lead_model(self, module: Llama, vocab_size: int) -> Decoder:
        """As it is."""
        return module

    def lead_pool(self, pool: LocalKvPool) -> KvPool:
        """As it is."""
        return pool

    def connect(self, rank: int, link: int) -> Channel:
        """There is nobody to connect to."""
        raise AssertionError(f"rank {rank} of one")

    def tell(self, op: Op, *arrays: Sequence[int] | Ints) -> None:
        """There is nobody to tell."""

    def answers(self, op: Op) -> list[Message]:
        """There is nobody to answer."""
        return []

    def call_roll(self) -> None:
        """There is nobody to call."""

    def lead_steps(self, module: Decoder, spec: StepSpec) -> StepRanks:
        """As they are."""
        return Alone(module)

    def confirm(self) -> None:
        """There is nobody who could have been missing."""

    def watch(self, on_lost: Callable[[str], None]) -> None:
        """There is nobody to lose."""

    def close(self) -> None:
        """There is nobody to end."""


ONE_RANK = OneRank()
