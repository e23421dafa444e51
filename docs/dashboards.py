"""Draws the panels of the Grafana dashboards as PNG, from a Prometheus: `python docs/dashboards.py --url URL`.

Grafana is not needed: the expressions are those of deploy/grafana/dashboards, the pictures are matplotlib's (extra
`draw`). Without --url it starts a test cluster, with a client that decodes, scrapes it for --seconds, and draws that.
"""

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib import pyplot as plt

mpl.use("Agg")
HERE = Path(__file__).resolve().parent
DASHBOARDS = HERE.parent / "deploy/grafana/dashboards"
if TYPE_CHECKING:
    from prometheus_process import Prometheus

# Of a panel's width and height in the grid of 24 columns, in inches.
CELL, HEIGHT = 0.62, 0.36
SAID = "drawn by docs/dashboards.py from a run of a test cluster; no screenshot of Grafana"
SHARDS = 2
UNITS = {"s": ("ms", 1e3), "bytes": ("MiB", 1 / (1 << 20)), "Bps": ("MB/s", 1e-6), "percentunit": ("%", 100.0)}


def variables(prometheus: "Prometheus", dashboard: dict[str, Any]) -> dict[str, str]:
    """By name: all that a variable of the dashboard can be, as it stands in a regular expression."""
    values = {"__rate_interval": "1m", "datasource": ""}
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            asked = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
            assert asked
            found = prometheus.get(f"label/{asked[2]}/values", **{"match[]": substitute(asked[1], values)})
            choices = "|".join(map(re.escape, found))
            values[variable["name"]] = json.dumps(f"({choices})")[1:-1]
    return values


def substitute(text: str, values: dict[str, str]) -> str:
    """As Grafana sends it."""
    return re.sub(r"\$\{?(\w+)\}?", lambda match: values[match[1]], text)


def legend(form: str, labels: dict[str, str]) -> str:
    """A series' name, as the panel says."""
    return re.sub(r"{{(\w+)}}", lambda match: labels.get(match[1], ""), form) or ", ".join(labels.values())


def shown(value: float, unit: str) -> str:
    """A value with its unit."""
    name, factor = UNITS.get(unit, ("", 1.0))
    return f"{value * factor:,.3g} {name}".strip()


def draw_lines(
    axes: Any, panel: dict[str, Any], prometheus: "Prometheus", values: dict[str, str], seconds: float
) -> int:
    """A panel over time; gives how many series it has."""
    unit, factor = UNITS.get(panel["fieldConfig"]["defaults"]["unit"], ("", 1.0))
    lines = []
    for target in panel["targets"]:
        for one in prometheus.query_range(substitute(target["expr"], values), seconds):
            points = [(float(at), float(value) * factor) for at, value in one["values"]]
            lines.append((legend(target["legendFormat"], one["metric"]), [p for p in points if math.isfinite(p[1])]))
    lines = [(name, points) for name, points in sorted(lines) if points]
    end = max((points[-1][0] for _, points in lines), default=0.0)
    if panel["fieldConfig"]["defaults"].get("custom", {}).get("stacking", {}).get("mode") == "normal":
        every = sorted({at for _, points in lines for at, _ in points})
        heights = [[dict(points).get(at, 0.0) for at in every] for _, points in lines]
        if lines:
            axes.stackplot([at - end for at in every], heights, labels=[name for name, _ in lines], alpha=0.7)
    else:
        for name, points in lines:
            axes.plot([at - end for at, _ in points], [value for _, value in points], label=name, linewidth=1.1)
    axes.set_ylim(0, axes.get_ylim()[1] * (1.5 if len(lines) > 3 else 1.25))  # room for the legend
    axes.set_ylabel(unit, fontsize=7)
    axes.tick_params(labelsize=6)
    axes.grid(alpha=0.3)
    if lines:
        axes.legend(fontsize=5.5, loc="upper left", framealpha=0.6, ncols=1 + (len(lines) > 6))
    return len(lines)


def draw_text(axes: Any, panel: dict[str, Any], prometheus: "Prometheus", values: dict[str, str]) -> int:
    """A panel of now, as lines of text."""
    found = []
    names = [
        name
        for step in panel.get("transformations", [])
        if step["id"] == "filterFieldsByName"
        for name in step["options"]["include"]["names"]
    ]
    for target in panel["targets"]:
        for one in prometheus.query(substitute(target["expr"], values)):
            if names:
                found.append("   ".join(one["metric"].get(name, "")[:18] for name in names))
            else:
                value = shown(float(one["value"][1]), panel["fieldConfig"]["defaults"]["unit"])
                found.append(f"{legend(target['legendFormat'], one['metric'])}:  {value}")
    axes.axis("off")
    axes.text(0, 1, "\n".join(sorted(found)[:12]), fontsize=6.5, va="top", family="monospace")
    return len(found)


def draw(prometheus: "Prometheus", name: str, out: Path, seconds: float) -> dict[str, int]:
    """Write OUT/NAME.png of a dashboard; gives how many series each panel has."""
    dashboard = json.loads((DASHBOARDS / f"{name}.json").read_text())
    values = variables(prometheus, dashboard)
    panels = dashboard["panels"]
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    figure = plt.figure(figsize=(24 * CELL, rows * HEIGHT + 0.6), dpi=80)
    figure.suptitle(f"{dashboard['title']}: {SAID}", fontsize=9, y=1 - 0.2 / (rows * HEIGHT))
    counts = {}
    top, height = 1 - 0.4 / (rows * HEIGHT + 0.6), 1 - 0.5 / (rows * HEIGHT + 0.6)
    for panel in panels:
        at = panel["gridPos"]
        left, low = at["x"] / 24, top - (at["y"] + at["h"]) / rows * height
        wide, high = at["w"] / 24, at["h"] / rows * height
        if panel["type"] == "row":
            figure.text(0.01, low + 0.2 * high, panel["title"], fontsize=9, weight="bold")
            continue
        axes = figure.add_axes((left + 0.03, low + 0.14 * high, wide - 0.04, high * 0.72))
        axes.set_title(panel["title"], fontsize=8, loc="left")
        if panel["type"] == "timeseries":
            counts[panel["title"]] = draw_lines(axes, panel, prometheus, values, seconds)
        else:
            counts[panel["title"]] = draw_text(axes, panel, prometheus, values)
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / f"{name}.png")
    plt.close(figure)
    return counts


# --- a cluster to draw


@contextmanager
def cluster(directory: Path) -> Iterator[list[str]]:
    """Servers of a model's shards, and a client that decodes: where each shows its metrics."""
    from engrampool_client.testing import serve_process

    model = directory / "v41"
    program = [sys.executable, "-m", "engrampool_proto"]
    command = [*program, "synth", "--like", "deepseek-v4.1", "--vocab-size", "20000", "--out", str(model)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    with ExitStack() as stack:
        servers = [
            stack.enter_context(serve_process(model, shard=f"{shard}/{SHARDS}", workers=1)) for shard in range(SHARDS)
        ]
        words = [sys.executable, __file__, "--decode", *(one.address for one in servers)]
        client = stack.enter_context(subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        stack.callback(client.kill)
        assert client.stdout is not None
        yield [*(one.metrics_address for one in servers), f"127.0.0.1:{client.stdout.readline().strip()}"]


def decode(targets: list[str]) -> None:
    """Steps of 32 sequences, and a prompt of 1000 tokens now and then, until the process is killed."""
    import numpy as np
    from prometheus_client import CollectorRegistry, start_http_server

    from engrampool_client import Client
    from engrampool_client.metrics import register

    rng = np.random.default_rng(0)
    with Client(targets, attach="off", cache_bytes=32 << 20) as client:
        registry = CollectorRegistry()
        register(client, registry=registry)
        print(start_http_server(0, "127.0.0.1", registry=registry)[0].server_port, flush=True)
        for number in range(sys.maxsize):
            # Tokens as text has them: few of them often.
            tokens = (rng.zipf(1.3, 1000 if number % 200 == 0 else 32) % 20000).astype(np.int32)
            step = client.prefetch(tokens, np.array([0, len(tokens)], np.int32))
            time.sleep(0.001)
            step.rows(1)
            time.sleep(0.01)
            step.rows(14)


def main() -> None:
    """As `--help` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "dashboards", help="where the pictures go")
    parser.add_argument("--url", help="of a Prometheus that runs, such as http://127.0.0.1:9090")
    parser.add_argument("--seconds", type=float, default=90.0, help="of the past that is drawn")
    parser.add_argument("--decode", nargs="+", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.decode:
        decode(chosen.decode)
    sys.path.insert(0, str(HERE.parent / "tests"))
    from prometheus_process import Prometheus, running_prometheus

    with ExitStack() as stack:
        if chosen.url:
            prometheus = Prometheus(chosen.url.rstrip("/"))
        else:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="engrampool-draw-")))
            targets = stack.enter_context(cluster(directory))
            prometheus = stack.enter_context(running_prometheus(directory, targets))
            time.sleep(chosen.seconds)
        for path in sorted(DASHBOARDS.glob("*.json")):
            counts = draw(prometheus, path.stem, chosen.out, chosen.seconds)
            empty = [title for title, count in counts.items() if not count]
            print(f"{path.stem}: {len(counts)} panels{', empty: ' + ', '.join(empty) if empty else ''}")


if __name__ == "__main__":
    main()
