"""Fills in the tables of docs/METRICS.md from the registries that answer Prometheus: `python docs/metrics.py`.

A metric is described once, where it is made: its name, kind, labels and help. Units are as Prometheus has them: a name
ends in `_seconds` or `_bytes`, and whatever has neither is a number of things, or 0 and 1. The same code gives the same
bytes.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prometheus_client import Metric, ProcessCollector

from engrampool_client.integrations.forwards.counts import EngineCounts
from engrampool_client.integrations.forwards.metrics import EngineCollector
from engrampool_client.metrics import ClientCollector
from engrampool_server.telemetry.counts import Counted
from engrampool_server.telemetry.exporter import Processes
from engrampool_server.telemetry.metrics import Metrics

HERE = Path(__file__).resolve().parent
UNITS = {"_seconds": "s", "_bytes": "bytes"}
Row = tuple[str, str, tuple[str, ...], str]  # name as Prometheus has it, kind, labels, help


def row(family: Metric, labels: tuple[str, ...]) -> Row:
    """Of one metric."""
    name = f"{family.name}_total" if family.type == "counter" else family.name
    return name, family.type, labels, family.documentation


def of_server() -> Iterator[Row]:
    """All that a server shows: what its processes count, and what is read of them."""
    registry = Metrics().registry
    for collector in registry._collector_to_names:
        made: Any = collector._metric if isinstance(collector, Counted) else collector
        if not isinstance(made, ProcessCollector):  # a server of several processes shows its own instead
            (family,) = made.describe()
            yield row(family, tuple(made._labelnames))
    nobody = memoryview(bytes(8)).cast("q")
    for family in Processes(os.getpid(), nobody, nobody).collect():
        yield row(family, ())


def of_client() -> Iterator[Row]:
    """All that a client may show."""
    for family in ClientCollector().describe():
        yield row(family, tuple(family._labelnames))


def of_engine() -> Iterator[Row]:
    """What an engine's worker shows beside that."""
    for family in EngineCollector("", EngineCounts([1])).describe():
        yield row(family, tuple(family._labelnames))


TABLES = {"server": of_server, "client": of_client, "engine": of_engine}


def unit(name: str) -> str:
    """As Prometheus has it in the name; "" for none."""
    return next((unit for ending, unit in UNITS.items() if name.removesuffix("_total").endswith(ending)), "")


def table(name: str) -> str:
    """The rows of one table, as Markdown."""
    lines = ["| metric | type | labels | unit | meaning |", "| --- | --- | --- | --- | --- |"]
    for metric, kind, labels, text in TABLES[name]():
        shown = ", ".join(f"`{label}`" for label in labels)
        cell = text.removesuffix(".").replace("|", "\\|")
        lines.append(f"| `{metric}` | {kind} | {shown} | {unit(metric)} | {cell} |")
    return "\n".join(lines)


def page(text: str) -> str:
    """The page with its tables as they are to be. Raises ValueError where one has no place."""
    for name in TABLES:
        begin, end = f"<!-- metrics of {name} -->\n", "<!-- -->"
        if text.count(begin) != 1:
            raise ValueError(f"docs/METRICS.md is to have one place for the metrics of {name}: {begin}")
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{table(name)}\n\n{end}{rest.partition(end)[2]}"
    return text


if __name__ == "__main__":
    described = HERE / "METRICS.md"
    described.write_text(page(described.read_text(encoding="utf-8")), encoding="utf-8")
