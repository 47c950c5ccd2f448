"""When a step's results are waited for: at once, or while the next step runs already."""

from typing import Protocol

from engine.plan import Scheduled
from engine.request import RequestState
from engine.runner import Runner
from engine.sampler import Sample
from engine.scheduler import Scheduler
from engine.step.ahead import plan_ahead
from engine.step.flights import Flight, Flights

Computed = tuple[list[Scheduled], list[Sample]]
"""A plan and its samples, one for each of `Request.samplers` where an item samples."""


class Pipeline(Protocol):
    """Schedules and runs; the engine commits."""

    @property
    def in_flight(self) -> bool:
        """A step is on its way; `step` is called until none is."""
        ...

    def step(self) -> Computed:
        """The next step whose results are known. The caller commits all of it before the next call."""
        ...


class InOrder:
    """Schedule, run, wait."""

    in_flight = False

    def __init__(self, scheduler: Scheduler, runner: Runner) -> None:
        self._scheduler = scheduler
        self._runner = runner

    def step(self) -> Computed:
        """See Pipeline."""
        plan = self._scheduler.schedule()
        samples = self._runner.run(plan) if plan else []
        self._scheduler.charge(plan)
        return plan, samples


class Overlapped:
    """While step n runs, step n + 1 is scheduled and started; then step n is waited for.

    1. A plan that decodes only departs as a flight; any other one runs in order.
    2. `plan_ahead` makes the next plan from the flight's, and it departs too.
    3. The first one lands. Requests that ended meanwhile, or were displaced, drop their token: the noise is a
       function of the position, so whoever computes it again draws the same.
    4. What requests in the second flight free, before it lands, is kept from others: it may still be written.
    """

    def __init__(self, scheduler: Scheduler, runner: Runner, flights: Flights, *, max_model_len: int) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._flights = flights
        self._max_model_len = max_model_len
        self._flight: Flight | None = None

    @property
    def in_flight(self) -> bool:
        """See Pipeline."""
        return self._flight is not None

    def step(self) -> Computed:
        """See Pipeline."""
        plan, samples = self._next()
        self._scheduler.charge(plan)
        return plan, samples

    def _next(self) -> Computed:
        if self._flight is None:
            plan = self._scheduler.schedule()
            if not self._flights.takes(plan):
                return plan, self._runner.run(plan) if plan else []
            self._flight = self._flights.start(plan)
        landing, self._flight = self._flight, self._follow(self._flight)
        return self._land(landing)

    def _follow(self, flight: Flight) -> Flight | None:
        """The next flight, if one can start before this one lands."""
        requests = {item.request for item in flight.plan}
        plan = plan_ahead(self._scheduler, requests, self._max_model_len)
        following = self._flights.start(plan, flight) if plan else None
        self._scheduler.tables.depart(item.request for item in plan or ())
        return following

    def _land(self, flight: Flight) -> Computed:
        samples = flight.samples()
        self._scheduler.tables.land()
        each = zip(flight.plan, samples, strict=True)
        kept = [(item, sample) for item, sample in each if item.request.state is RequestState.RUNNING]
        return [item for item, _ in kept], [sample for _, sample in kept]


def make_pipeline(scheduler: Scheduler, runner: Runner, max_model_len: int) -> Pipeline:
    """Overlapped if the runner can start steps that nobody waits for."""
    if runner.flights is None:
        return InOrder(scheduler, runner)
    return Overlapped(scheduler, runner, runner.flights, max_model_len=max_model_len)
