"""Opening of an epoch: the receiver answers a Hello, the sender judges the Welcome."""

from collections.abc import Callable

from kvtransfer.errors import LinkViolation
from kvtransfer.layout import KvFacts, layer_block_bytes
from kvtransfer.messages import Hello, Welcome
from kvtransfer.plan import frame_sizes
from runtime.errors import Mismatch

MAX_FRAME_SIZES = 16
"""A sender refuses longer tables."""

MAX_SLABS = 1024
"""A sender refuses to be granted more slabs."""


def answer(
    hello: Hello,
    *,
    facts: KvFacts,
    boot_id: str,
    refusal: Callable[[str, bytes], str | None],
    slab_bytes: Callable[[str], int],
    num_slabs: int,
    epoch: int,
    num_ranks: int = 1,
) -> Welcome:
    """The choices of a receiver of so many ranks for this epoch.

    Takes the first of the sender's transports, each with its proof, for which `refusal` has no reason;
    `slab_bytes` is by transport. Raises Mismatch if the hello is meant for another boot, if a KV fact that
    matters differs (all are named), if every transport is refused (with all reasons), or if the sender knows
    nothing of ranks and would have to.
    """
    if hello.receiver_boot_id != boot_id:
        raise Mismatch(f"boot {hello.receiver_boot_id} was wanted, this is boot {boot_id}")
    num_groups = facts.num_common_groups(hello.facts)
    _require_ranks_known(hello.num_ranks, num_ranks)
    transport = _first_accepted(hello, refusal)
    return Welcome(
        epoch=epoch,
        transport=transport,
        frame_sizes=frame_sizes(slab_bytes(transport)),
        num_slabs=num_slabs,
        num_groups=num_groups,
        num_ranks=num_ranks,
    )


def _require_ranks_known(theirs: int, ours: int) -> None:
    """Frames come and go whole where a peer knows nothing of ranks: then there must be one."""
    if theirs == 0 and ours > 1:
        raise Mismatch(f"this worker has {ours} ranks, and the other's version knows nothing of ranks")


def _first_accepted(hello: Hello, refusal: Callable[[str, bytes], str | None]) -> str:
    reasons = []
    proofs = (*hello.transport_proofs, *[b""] * len(hello.transports))
    for name, proof in zip(hello.transports, proofs, strict=False):
        reason = refusal(name, proof)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    raise Mismatch("no transport for this link: " + "; ".join(reasons))


def require_usable(welcome: Welcome, hello: Hello, *, max_slab_bytes: int) -> None:
    """Raise LinkViolation unless the welcome answers `hello` within this side's limits; Mismatch if the
    receiver knows nothing of ranks and would have to."""
    _require_ranks_known(welcome.num_ranks, hello.num_ranks)
    sizes, facts = welcome.frame_sizes, hello.facts
    least = max(layer_block_bytes(group, facts.block_size) for group in facts.groups)
    if welcome.transport not in hello.transports:
        raise LinkViolation(f"transport {welcome.transport!r} was not offered")
    if not 1 <= len(sizes) <= MAX_FRAME_SIZES or list(sizes) != sorted(set(sizes), reverse=True):
        raise LinkViolation(f"frame sizes {sizes} do not descend")
    if sizes[-1] < 1 or sizes[0] > max(max_slab_bytes, 2 * least) or sizes[0] < least:
        raise LinkViolation(f"slab of {sizes[0]} bytes, wanted {least} to {max_slab_bytes}")
    if not 1 <= welcome.num_slabs <= MAX_SLABS:
        raise LinkViolation(f"{welcome.num_slabs} slabs")
    if not 1 <= welcome.num_groups <= len(facts.groups):
        raise LinkViolation(f"{welcome.num_groups} groups of {len(facts.groups)}")
