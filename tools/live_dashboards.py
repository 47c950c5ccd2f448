"""Asks a running Prometheus for every panel: `python tools/live_dashboards.py http://127.0.0.1:9090`.

Prints one line for each query: dashboard, panel, number of series, a value. Exit code 1 if Prometheus refuses
an expression or if a panel that must have data under load is empty.
"""

import sys
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.dashboards import DASHBOARDS  # noqa: E402
from tools.grafana.promql import WINDOW  # noqa: E402

MAY_BE_EMPTY = ("Failed and refused", "Retries and migrations", "Preemptions")
"""Panels of what a good day has none of."""


class Prometheus:
    """The part of its HTTP API that is used here."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=10, trust_env=False)

    def query(self, expr: str) -> list[dict[str, Any]]:
        """Series of an instant query; ValueError with Prometheus's own words."""
        answer = self._client.get("/api/v1/query", params={"query": expr}).json()
        if answer["status"] != "success":
            raise ValueError(answer["error"])
        result: list[dict[str, Any]] = answer["data"]["result"]
        return result

    def instance(self) -> str:
        """Some worker."""
        found = self.query('up{job=~"prefill|decode"} == 1')
        return str(found[0]["metric"]["instance"]) if found else ""


def main(url: str) -> int:
    """Print the table; returns the exit code."""
    prometheus = Prometheus(url)
    instance = prometheus.instance()
    num_bad = 0
    for name, dashboard in DASHBOARDS.items():
        for row in dashboard.rows:
            for panel in row.panels:
                for query in panel.queries:
                    expr = query.expr.replace(WINDOW, "1m").replace("$instance", instance)
                    line, good = _judge(prometheus, expr)
                    good = good or panel.title in MAY_BE_EMPTY
                    num_bad += not good
                    print(f"{'ok ' if good else 'BAD'} {name:8} {panel.title:32} {query.legend:24} {line}")
    print(f"{num_bad} bad")
    return min(num_bad, 1)


def _judge(prometheus: Prometheus, expr: str) -> tuple[str, bool]:
    try:
        series = prometheus.query(expr)
    except ValueError as error:
        return str(error), False
    values = [one["value"][1] for one in series]
    numbers = [value for value in values if value != "NaN"]
    if not numbers:
        return f"{len(values)} series, no number among them", False
    return f"{len(numbers)} of {len(values)} series, for example {numbers[0]}", True


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
