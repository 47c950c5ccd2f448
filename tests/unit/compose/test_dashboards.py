"""Dashboards and rules ask only for what some process exports."""

import json
import re
from pathlib import Path

import pytest
import yaml
from prometheus_client.utils import floatToGoString

from engine.speculative.speculation import SpeculationStats
from gateway.metrics import GatewayMetrics
from tools import dashboards
from worker.metrics import WorkerMetrics
from worker.speculation_metrics import SpeculationCollector

COMPOSE = Path(__file__).resolve().parents[3] / "compose"
FROM_PROMETHEUS = {"job", "instance", "le"}
SELECTOR = re.compile(r"\b(tandem_\w+)(?:\{([^}]*)\})?")
RECORDED = re.compile(r"\btandem:[\w:]+")
GROUPING = re.compile(r"\bby \(([^)]*)\)")
MATCHER = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)")
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}


class PrefixCacheStats:
    """The engine's counts, all zero."""

    queries = hits = evicted_blocks = 0


class Timelines:
    """No attempt is anywhere."""

    def in_stages(self):
        return {}


def registries():
    for side, role in (("sender", "prefill"), ("receiver", "decode")):
        metrics = WorkerMetrics(side)
        metrics.watch_prefix_cache(PrefixCacheStats())
        metrics.registry.register(SpeculationCollector(SpeculationStats()))
        metrics.watch_attempts(role, Timelines(), float)
        yield metrics.registry
    yield GatewayMetrics().registry


@pytest.fixture(scope="module")
def exported():
    """Name of each time series -> its labels; and bucket bounds of each histogram."""
    labels: dict[str, set[str]] = {}
    bounds: dict[str, set[str]] = {}
    for registry in registries():
        for collector in set(registry._collector_to_names):
            for family in collector.collect():
                own = {name for of in (collector, family) for name in getattr(of, "_labelnames", ())}
                for suffix in SUFFIXES[family.type]:
                    labels.setdefault(family.name + suffix, set()).update(own)
                uppers = {floatToGoString(upper) for upper in getattr(collector, "_upper_bounds", ())}
                uppers |= {sample.labels["le"] for sample in family.samples if "le" in sample.labels}
                bounds[family.name + "_bucket"] = uppers
    return labels, bounds


def rules(*kinds):
    """Every rule of the two rule files that has one of these keys."""
    for name in ("recording.yaml", "alerts.yaml"):
        for group in yaml.safe_load((COMPOSE / "prometheus" / name).read_text())["groups"]:
            yield from (rule for rule in group["rules"] if set(kinds) & rule.keys())


def queries():
    """(where, expression) of everything that is asked of Prometheus."""
    for name, dashboard in dashboards.DASHBOARDS.items():
        for row in dashboard.rows:
            for panel in row.panels:
                yield from ((f"{name}: {panel.title}", query.expr) for query in panel.queries)
        for variable in dashboard.variables:
            metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["definition"]).groups()
            yield f"{name}: ${variable['name']}", f"sum by ({label}) ({metric})"
    yield from ((rule.get("record") or rule["alert"], rule["expr"]) for rule in rules("record", "alert"))


QUERIES = list(queries())


@pytest.mark.parametrize(("where", "expr"), QUERIES, ids=[where for where, _ in QUERIES])
def test_every_query_asks_for_what_exists(where, expr, exported):
    labels, bounds = exported
    found = SELECTOR.findall(expr)
    assert found or RECORDED.search(expr) or "up{" in expr, where
    known = set(FROM_PROMETHEUS)
    for metric, matchers in found:
        assert metric in labels, f"{where}: no process exports {metric}"
        names = set(MATCHER.findall(matchers))
        assert names <= labels[metric] | FROM_PROMETHEUS, f"{where}: {metric} has no such label"
        known |= labels[metric]
        for bound in re.findall(r'le="([^"]*)"', matchers):
            assert bound in bounds[metric], f"{where}: {metric} has no bucket {bound}"
    for grouping in GROUPING.findall(expr):
        assert set(re.split(r",\s*", grouping)) <= known, where
    recorded = {rule["record"] for rule in rules("record")}
    assert set(RECORDED.findall(expr)) <= recorded, where


def test_the_check_finds_what_it_looks_for(exported):
    for wrong in ("rate(tandem_nope[1m])", 'tandem_num_requests_running{side="x"}', "tandem:nope:rate1m"):
        with pytest.raises(AssertionError):
            test_every_query_asks_for_what_exists("here", wrong, exported)
    with pytest.raises(AssertionError, match=r"no bucket 0\.3"):
        test_every_query_asks_for_what_exists(
            "here", 'tandem_time_to_first_token_seconds_bucket{le="0.3"}', exported
        )


@pytest.mark.parametrize("name", dashboards.DASHBOARDS)
def test_dashboards_are_fresh(name):
    """After a change of the description: python tools/dashboards.py"""
    path = dashboards.FOLDER / f"{name}.json"
    assert path.read_text() == dashboards.render(dashboards.DASHBOARDS[name])


def test_no_other_dashboard_is_provisioned():
    assert {path.stem for path in dashboards.FOLDER.iterdir()} == set(dashboards.DASHBOARDS)


@pytest.mark.parametrize("name", dashboards.DASHBOARDS)
def test_panels_have_ids_of_their_own_and_do_not_overlap(name):
    page = json.loads((dashboards.FOLDER / f"{name}.json").read_text())
    ids = [panel["id"] for panel in page["panels"]]
    assert len(set(ids)) == len(ids)
    taken = set()
    for panel in page["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert all(x < 24 for x, _ in cells)
        assert not cells & taken, panel["title"]
        taken |= cells


def test_searches_for_traces_name_spans_that_are_recorded():
    root = COMPOSE.parent
    sources = [
        path
        for folder in ("gateway", "worker", "prefill_svc", "decode_svc")
        for path in (root / folder).glob("*.py")
    ]
    text = "".join(path.read_text() for path in sources)
    searches = [panel.traceql for row in dashboards.TRACES.rows for panel in row.panels if panel.traceql]
    for search in searches:
        for name in re.findall(r'name = ("[^"]*")', search):
            assert name in text, search
    assert len(searches) > 3


def test_data_sources_are_those_that_are_provisioned():
    folder = COMPOSE / "grafana" / "provisioning"
    sources = yaml.safe_load((folder / "datasources" / "tandem.yaml").read_text())["datasources"]
    kinds = {source["uid"]: source["type"] for source in sources}
    for dashboard in dashboards.DASHBOARDS.values():
        for panel in dashboards.to_json(dashboard)["panels"]:
            if panel["type"] != "row":
                assert kinds[panel["datasource"]["uid"]] == panel["datasource"]["type"]
                assert len(panel["targets"]) > 0
    links = sources[0]["jsonData"]["exemplarTraceIdDestinations"]
    assert {link["datasourceUid"] for link in links} <= set(kinds)
