"""The dashboards in compose/grafana/dashboards: `python tools/dashboards.py` writes them.

tests/unit/compose fails on a metric that no process exports, and on a file that is not what this one says.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.grafana.panels import Dashboard, to_json  # noqa: E402
from tools.grafana.service import SERVICE, TRACES  # noqa: E402
from tools.grafana.workers import SPLIT, WORKER  # noqa: E402

FOLDER = ROOT / "compose" / "grafana" / "dashboards"

DASHBOARDS = {"service": SERVICE, "split": SPLIT, "worker": WORKER, "traces": TRACES}
"""File name -> what it shows."""


def render(dashboard: Dashboard) -> str:
    """The text of a dashboard's file."""
    return json.dumps(to_json(dashboard), indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    """Write all files."""
    for name, dashboard in DASHBOARDS.items():
        (FOLDER / f"{name}.json").write_text(render(dashboard))
        print(f"{name}.json: {sum(len(row.panels) for row in dashboard.rows)} panels")


if __name__ == "__main__":
    main()
