"""One view of several gateway processes: their metrics and states, added up. Pure."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

UNREADY = ("down", "draining", "starting", "ready")
"""States of a worker, the worst first."""


class _Sum(Collector):
    def __init__(self, pages: Iterable[str]) -> None:
        self._pages = pages

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for page in self._pages:
            for family in text_string_to_metric_families(page):
                _add(families.setdefault(family.name, _empty(family)), family)
        return iter(families.values())


def _empty(family: Metric) -> Metric:
    return Metric(family.name, family.documentation, family.type)


def _add(total: Metric, family: Metric) -> None:
    places = {_key(sample): place for place, sample in enumerate(total.samples)}
    for sample in family.samples:
        place = places.get(_key(sample))
        if place is None:
            total.samples.append(sample)
        else:
            value = total.samples[place].value + sample.value
            total.samples[place] = sample._replace(value=value)


def _key(sample: Any) -> tuple[str, tuple[tuple[str, str], ...]]:
    return sample.name, tuple(sorted(sample.labels.items()))


def merged_metrics(pages: Iterable[str]) -> CollectorRegistry:
    """Every sample is the sum of those of the same name and labels on the pages, which are plain text."""
    registry = CollectorRegistry()
    registry.register(_Sum(list(pages)))
    return registry


def merged_state(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The first one's state with all counts added up; a worker is as ready as it is to the last of them."""
    first = states[0]
    merged = {name: _total([state[name] for state in states]) for name in first}
    seen = [{worker["id"]: worker["state"] for worker in state["workers"]} for state in states]
    merged["workers"] = [
        worker | {"state": min((ids.get(worker["id"], "starting") for ids in seen), key=UNREADY.index)}
        for worker in first["workers"]
    ]
    return merged | {"gateway_processes": len(states)}


def _total(values: Sequence[Any]) -> Any:
    """Of counts, or of what holds counts by name; of anything else the first."""
    first = values[0]
    if isinstance(first, dict):
        return {name: _total([value[name] for value in values]) for name in first}
    return sum(values) if isinstance(first, int) else first
