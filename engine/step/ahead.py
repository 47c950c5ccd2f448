"""The plan of a step while the one before it runs: integers and lists, as the scheduler's own.

It is made only where the running step cannot change it but by ending requests, whose tokens are then dropped:
everybody decodes, nobody waits who could start, and blocks suffice without taking any.
"""

from collections.abc import Collection

from engine.plan import Scheduled
from engine.request import Request
from engine.scheduler import Scheduler
from engine.step.flights import draws_on_device


def plan_ahead(
    scheduler: Scheduler, in_flight: Collection[Request], max_model_len: int
) -> list[Scheduled] | None:
    """One token for every running request, behind the one that is being drawn for those in flight.

    None: the running step has to land first. Blocks are allocated for whoever is in the plan.
    """
    if scheduler.policy.pauses or scheduler.may_start_prompts:
        return None
    running = [
        request
        for request in scheduler.decode.running
        if not (request in in_flight and _is_last(request, max_model_len))
    ]
    if not running or not all(_can_go_on(request, request in in_flight) for request in running):
        return None
    tables = scheduler.tables
    lens = [request.num_tokens + (request in in_flight) for request in running]
    missing = [tables.missing(request, length) for request, length in zip(running, lens, strict=True)]
    if sum(missing) > tables.num_free:
        return None
    for request, length, number in zip(running, lens, missing, strict=True):
        if number:
            tables.grow(request, length)
    tables.run_copies()
    return [Scheduled(request, 1) for request in running]


def _is_last(request: Request, max_model_len: int) -> bool:
    """The token that is being drawn ends the request, whatever it is."""
    num_outputs = len(request.output_token_ids) + 1
    return num_outputs >= request.sampling.max_tokens or request.num_tokens + 1 >= max_model_len


def _can_go_on(request: Request, is_in_flight: bool) -> bool:
    lag = request.num_tokens - request.num_computed_tokens
    return lag == 1 and (is_in_flight or draws_on_device(request))
