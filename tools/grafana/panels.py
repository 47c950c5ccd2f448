"""Grafana dashboards from a few words: rows of panels, panels of queries (Grafana ≥ 10.4)."""

from dataclasses import dataclass, field
from typing import Any

SCHEMA_VERSION = 39
GRID_WIDTH = 24
PANEL_HEIGHT = 8
STAT_HEIGHT = 4

METRICS = {"type": "prometheus", "uid": "prometheus"}
TRACES = {"type": "tempo", "uid": "tempo"}
"""Data sources by the uid that provisioning gives them."""

Json = dict[str, Any]


@dataclass(frozen=True)
class Query:
    """One PromQL expression and the name of its lines; `{{label}}` is replaced by Grafana."""

    expr: str
    legend: str = ""


@dataclass(frozen=True)
class Panel:
    """What one rectangle shows."""

    title: str
    queries: tuple[Query, ...] = ()
    unit: str = "short"
    """Grafana's name of a unit: s, Bps, percentunit, reqps, …"""
    kind: str = "timeseries"
    """timeseries, stat, heatmap, or traces."""
    about: str = ""
    """What a person should conclude from it."""
    traceql: str = ""
    """The search of a panel of kind traces."""
    stacked: bool = False


@dataclass(frozen=True)
class Row:
    """Panels side by side under a heading; they share the width."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Dashboard:
    """One page."""

    uid: str
    title: str
    rows: tuple[Row, ...]
    variables: tuple[Json, ...] = field(default=())


def label_variable(name: str, label: str, metric: str) -> Json:
    """A drop-down of the values of a label."""
    query = f"label_values({metric}, {label})"
    return {
        "name": name,
        "type": "query",
        "datasource": METRICS,
        "definition": query,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "sort": 1,
        "includeAll": False,
        "multi": False,
    }


def to_json(dashboard: Dashboard) -> Json:
    """What Grafana imports."""
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "tags": ["tandem"],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "5s",
        "time": {"from": "now-15m", "to": "now"},
        "templating": {"list": list(dashboard.variables)},
        "links": [
            {
                "type": "dashboards",
                "tags": ["tandem"],
                "title": "Tandem",
                "asDropdown": True,
                "keepTime": True,
            }
        ],
        "panels": _panels(dashboard.rows),
    }


def _panels(rows: tuple[Row, ...]) -> list[Json]:
    found: list[Json] = []
    top = 0
    for row in rows:
        found.append(_heading(row.title, top, len(found) + 1))
        top += 1
        width = GRID_WIDTH // len(row.panels)
        height = STAT_HEIGHT if all(panel.kind == "stat" for panel in row.panels) else PANEL_HEIGHT
        for place, panel in enumerate(row.panels):
            position = {"x": place * width, "y": top, "w": width, "h": height}
            found.append(_panel(panel, len(found) + 1) | {"gridPos": position})
        top += height
    return found


def _heading(title: str, top: int, number: int) -> Json:
    position = {"x": 0, "y": top, "w": GRID_WIDTH, "h": 1}
    return {
        "id": number,
        "type": "row",
        "title": title,
        "collapsed": False,
        "panels": [],
        "gridPos": position,
    }


def _panel(panel: Panel, number: int) -> Json:
    source = TRACES if panel.kind == "traces" else METRICS
    return {
        "id": number,
        "title": panel.title,
        "description": panel.about,
        "datasource": source,
        **_LOOKS[panel.kind](panel),
        "targets": [_search(panel)] if panel.kind == "traces" else _targets(panel),
    }


def _targets(panel: Panel) -> list[Json]:
    return [
        {
            "refId": chr(ord("A") + place),
            "datasource": METRICS,
            "expr": query.expr,
            "legendFormat": query.legend or "__auto",
            "exemplar": panel.kind != "stat",
            "format": "heatmap" if panel.kind == "heatmap" else "time_series",
        }
        for place, query in enumerate(panel.queries)
    ]


def _search(panel: Panel) -> Json:
    return {
        "refId": "A",
        "datasource": TRACES,
        "queryType": "traceql",
        "query": panel.traceql,
        "limit": 50,
        "tableType": "traces",
    }


def _lines(panel: Panel) -> Json:
    custom = {"fillOpacity": 20 if panel.stacked else 5, "showPoints": "never"}
    if panel.stacked:
        custom["stacking"] = {"mode": "normal", "group": "A"}
    return {
        "type": "timeseries",
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, "custom": custom}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
    }


def _stat(panel: Panel) -> Json:
    return {
        "type": "stat",
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "options": {"reduceOptions": {"calcs": ["lastNotNull"]}, "graphMode": "area", "colorMode": "none"},
    }


def _heatmap(panel: Panel) -> Json:
    return {
        "type": "heatmap",
        "fieldConfig": {"defaults": {}, "overrides": []},
        "options": {
            "calculate": False,
            "yAxis": {"unit": panel.unit},
            "exemplars": {"color": "orange"},
            "color": {"mode": "scheme", "scheme": "Oranges"},
        },
    }


def _traces(_: Panel) -> Json:
    return {
        "type": "table",
        "fieldConfig": {"defaults": {}, "overrides": []},
        "options": {"showHeader": True},
    }


_LOOKS = {"timeseries": _lines, "stat": _stat, "heatmap": _heatmap, "traces": _traces}
