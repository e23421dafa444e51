"""The pages name what there is: every metric of a server, every event logged, every resource that preflight checks."""

import ast
import re
import urllib.request
from dataclasses import replace
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from engrampool_server.machine import Machine, Room
from engrampool_server.memory.preflight import OVERHEAD_BYTES, WORKER_BYTES, Need, check
from server_fixtures import LIMIT_S, eventually

ROOT = Path(__file__).parents[2]


def table(header: str, page: str = "OPERATIONS.md") -> list[list[str]]:
    """The rows of the first table that begins with this column."""
    lines = (ROOT / "docs" / page).read_text().splitlines()
    at, *_ = [number for number, line in enumerate(lines) if line.startswith(f"| {header} |")]
    rows = []
    for line in lines[at + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def quoted(cell: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", cell))


def test_the_metrics_are_what_a_server_exposes(server, round_of_lookups):
    def exposed() -> dict[str, tuple[str, set[str]]]:
        """After lookups; what they counted is there a moment later."""
        round_of_lookups()
        with urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=LIMIT_S) as response:
            families = list(text_string_to_metric_families(response.read().decode()))
        found = {}
        for family in families:
            name = f"{family.name}_total" if family.type == "counter" else family.name
            found[name] = (family.type, {label for sample in family.samples for label in sample.labels} - {"le"})
        return found

    rows = table("metric", "METRICS.md")
    assert all(meaning for *_, meaning in rows)
    documented = {name.strip("`"): (kind, quoted(labels)) for name, kind, labels, *_ in rows}
    assert len(documented) == len(rows)
    eventually(lambda: documented == exposed(), "all that is documented, and nothing else, is exposed")


def test_the_events_are_what_the_server_logs():
    logged: dict[str, set[str]] = {}
    for path in (ROOT / "server/engrampool_server").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("log.event", "event"):
                fields = {str(keyword.arg) for keyword in node.keywords} - {"level"}
                logged.setdefault(ast.literal_eval(node.args[0]), set()).update(fields)

    assert {name.strip("`"): quoted(fields) for name, fields, _ in table("event")} == logged


def test_the_resources_are_what_preflight_checks():
    room = Room("/pod", 1 << 40)
    machine = replace(Machine.read(), memory_room=room, huge_page_room=room, address_limit_bytes=1 << 40)
    checked = {
        line.resource.replace("/pod", "PATH")
        for memory in ("anon", "shm", "hugetlb", "file:/mnt")
        for line in check(Need(1 << 20, files=1), memory, True, machine).lines
    }
    assert {resource.strip("`") for resource, *_ in table("resource")} == checked


def test_the_memory_beside_the_tables_is_what_preflight_sets_aside():
    said = f"{OVERHEAD_BYTES >> 20} MiB, and {WORKER_BYTES >> 20} MiB for each worker after the first"
    assert said in (ROOT / "docs/OPERATIONS.md").read_text()
