"""Tables and plots of the harness's records."""

import datetime
import importlib.metadata
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]

# system, tokens, measure, at least or at most, times, of which system; taken within rounds, for uniform ids
_RATIOS: list[tuple[str, int, str, str, float, str, int]] = [
    *(("engrampool-grpc", t, "GB/s", ">=", 0.60, "raw-socket", t) for t in (1024, 4096)),
    *(("engrampool-grpc", t, "GB/s", ">=", 1.2, "arrow-flight", t) for t in (1024, 4096)),
    ("engrampool-grpc", 64, "p50", "<=", 1.2, "arrow-flight", 64),
    ("engrampool-grpc", 1, "p50", "<=", 1.3, "grpc-empty", 1),
    ("engrampool-direct", 1, "p50", "<=", 2.0, "raw-socket", 1),
    ("engrampool-direct", 1, "p50", "<=", 1.0, "redis", 1),
    ("engrampool-direct", 64, "p50", "<=", 2.0, "raw-socket", 64),
    *(("engrampool-direct", t, "GB/s", ">=", 0.80, "raw-socket", t) for t in (1024, 4096)),
    *(
        ("engrampool-grpc", t, "tokens/s", ">" if t == 64 else ">=", 1.0 if t == 64 else times, peer, t)
        for peer, times in (
            ("redis", 4.0),
            ("memcached", 4.0),
            ("engramdb", 5.0),
            ("mooncake-tcp", 50.0),
            ("hurried-grpc", 5.0),
        )
        for t in (64, 256, 1024, 4096)
    ),
    *(("engrampool-grpc", t, "server CPU/GB", "<=", 2.5, "raw-socket", t) for t in (1024, 4096)),
]
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">=": lambda a, b: a >= b,
    ">": lambda a, b: a > b,
    "<=": lambda a, b: a <= b,
    "<": lambda a, b: a < b,
}


def markdown(records: Sequence[Record]) -> str:
    """The whole report."""
    batches = [record for record in records if record["study"] == "batches"]
    parts = [f"{machine()}\n"]
    steps = [record for record in records if record["study"] == "decode"]
    if steps:
        parts += ["### Lookups with the pauses of a decode step\n", decode(steps)]
    for kind in dict.fromkeys(record["ids"] for record in batches):
        parts += [f"### {kind.capitalize()} ids\n", _batch_table([r for r in batches if r["ids"] == kind])]
    parts += _skipped(records)
    parts += _tables_table([record for record in records if record["study"] == "tables"])
    parts += _workers_table([record for record in records if record["study"] == "workers"])
    parts += _gather_table([record for record in records if record["study"] == "gather"])
    parts += ["### Targets\n", targets(records)]
    return "\n".join(parts)


def machine() -> str:
    """When and where, in one line."""
    names = (
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    words = [
        datetime.date.today().isoformat(),
        f"{len(os.sched_getaffinity(0))} cores of {next(names, platform.machine())}",
        f"{memory:.0f} GiB",
        f"Linux {platform.release().partition('-')[0]}",
        f"CPython {platform.python_version()}",
        *(f"{name} {importlib.metadata.version(name)}" for name in ("numpy", "grpcio")),
    ]
    return ", ".join(words)


def decode(records: Sequence[Record]) -> str:
    """The table of bench/decode.py."""
    lines = [
        "| tokens | pause ms | other thread | system | prefetch returns, p50 / p99 ms | first layer | all rows | "
        "prefetch / raw's | first layer / raw's all | all / raw's all | server CPU s/GB | calls |",
        "| ---: | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    parts = ("prefetch_", "first_layer_", "")
    for record in records:
        cells = [str(record["tokens"]), f"{record['pause_ms']:g}", record["thread"], record["system"]]
        cells += [" / ".join(_figure(record[f"{part}{what}_ms"]) for what in ("p50", "p99")) for part in parts]
        cells += [_figure(record[f"{part}to_raw"]) for part in parts]
        cells += [_figure(record["server_cpu_s_per_gb"]), str(record["calls"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _batch_table(records: Sequence[Record]) -> str:
    lines = [
        "| tokens | system | p50 ms | rounds' p50 ms | p99 ms | GB/s | tokens/s | p50 / raw socket | "
        "server CPU s/GB | client CPU s/GB | calls |",
        "| ---: | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    measured = [record for record in records if record["p50_ms"] is not None]
    for tokens in sorted({record["tokens"] for record in measured}):
        ceiling = next((r for r in measured if r["tokens"] == tokens and r["system"] == "raw-socket"), None)
        for record in (r for r in measured if r["tokens"] == tokens):
            rounds = record["p50_ms_rounds"]
            cells = [
                str(tokens),
                record["system"],
                _figure(record["p50_ms"]),
                f"{_figure(min(rounds))} - {_figure(max(rounds))}",
                _figure(record["p99_ms"]),
                _figure(record["gb_per_s"] if record["rows"] else None),
                _figure(tokens / record["p50_ms"] * 1e3 if record["rows"] else None),
                _figure(_median_ratio(record, ceiling, "p50_ms_rounds")),
                _figure(record["server_cpu_s_per_gb"]),
                _figure(record["client_cpu_s_per_gb"]),
                str(record["calls"]),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _skipped(records: Iterable[Record]) -> list[str]:
    why: dict[tuple[str, str], list[int]] = {}
    for record in records:
        if "skipped" in record:
            sizes = why.setdefault((record["system"], record["skipped"]), [])
            if record["tokens"] not in sizes:
                sizes.append(record["tokens"])
    if not why:
        return []
    lines = [f"- {system} at {', '.join(map(str, sizes))} tokens: {text}" for (system, text), sizes in why.items()]
    return ["### Not measured\n", "\n".join(lines) + "\n"]


def _tables_table(records: Sequence[Record]) -> list[str]:
    records = [record for record in records if record["p50_ms"] is not None]
    if not records:
        return []
    lines = ["| system | table GB | p50 ms | GB/s | rows/s |", "| --- | ---: | ---: | ---: | ---: |"]
    for record in records:
        size = record["table_rows"] * 264 / 1e9
        cells = (size, record["p50_ms"], record["gb_per_s"], record["rows"] / record["p50_ms"] * 1e3)
        lines.append(f"| {record['peer']} | {' | '.join(map(_figure, cells))} |")
    return [f"### Size of the tables, {records[0]['tokens']} tokens\n", "\n".join(lines) + "\n"]


def _workers_table(records: Sequence[Record]) -> list[str]:
    measured = [record for record in records if record["p50_ms"] is not None]
    if not measured:
        return []
    lines = [
        "| workers | clients | p50 ms | GB/s of all clients | server CPU s/GB | server memory (PSS) GB |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in measured:
        cells = (r["p50_ms"], r["gb_per_s"], r["server_cpu_s_per_gb"], r["pss_bytes"] / 1e9)
        lines.append(f"| {r['workers']} | {r['clients']} | {' | '.join(map(_figure, cells))} |")
    return [f"### Workers, {measured[0]['tokens']} tokens a call\n", "\n".join(lines) + "\n"]


def _gather_table(records: Sequence[Record]) -> list[str]:
    if not records:
        return []
    lines = [
        "| table GB | row bytes | kernel ns/row | np.take ns/row | np.take / kernel |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    for (size, width), (kernel, take) in _gathers(records).items():
        lines.append(f"| {' | '.join(map(_figure, (size, width, kernel, take, take / kernel)))} |")
    return ["### Gather kernel, processor time of one thread\n", "\n".join(lines) + "\n"]


def _gathers(records: Sequence[Record]) -> dict[tuple[float, int], tuple[float, float]]:
    """(GB, row bytes) -> ns a row of the kernel and of np.take."""
    found = {(r["system"], r["table_gb"], r["row_bytes"]): r["ns_per_row"] for r in records if r["study"] == "gather"}
    kernels = ((size, width) for system, size, width in found if system == "gather-kernel")
    return {key: (found["gather-kernel", *key], found["gather-np.take", *key]) for key in kernels}


def targets(records: Sequence[Record]) -> str:
    """Ratios that are aimed at, and what this run has of them: the median of the rounds' ratios, and their range."""
    lines = ["| target | measured | rounds | holds |", "| --- | ---: | --- | --- |"]
    for system, tokens, measure, sign, times, other, other_tokens in _RATIOS:
        text = f"{system}, {tokens} tokens: {measure} {sign} {times:g} x {other}"
        ratios = _ratios(_find(records, system, tokens), _find(records, other, other_tokens), measure)
        lines.append(_verdict(text, ratios, sign, times))
    pair = [_find_workers(records, workers, 2) for workers in (2, 1)]
    ratios = _ratios(*pair, "GB/s")
    lines.append(_verdict("2 workers, 2 clients: GB/s >= 1 x 1 worker, 2 clients", ratios, ">=", 1.0))
    gathers = {size: times for (size, width), times in _gathers(records).items() if width == 264}
    ratios = [gathers[max(gathers)][1] / gathers[max(gathers)][0]] if gathers else []
    lines.append(_verdict(f"gather, {max(gathers, default=12):g} GB: rows/s >= 1.7 x np.take", ratios, ">=", 1.7))
    ratios = [gathers[max(gathers)][0] / gathers[min(gathers)][0]] if len(gathers) > 1 else []
    sizes = f"{max(gathers, default=12):g} GB: ns/row < 1.15 x {min(gathers, default=1):g} GB"
    lines.append(_verdict(f"gather, {sizes}", ratios, "<", 1.15))
    memory = [record["pss_bytes"] / 1e9 for record in pair if record is not None and "pss_bytes" in record]
    ratios = [memory[0] / memory[1]] if len(memory) == 2 else []
    lines.append(_verdict("2 workers: memory < 1.05 x 1 worker", ratios, "<", 1.05))
    return "\n".join(lines) + "\n"


def _verdict(text: str, ratios: Sequence[float], sign: str, times: float) -> str:
    if not ratios:
        return f"| {text} | - | - | not measured |"
    middle = statistics.median(ratios)
    holds = "yes" if _COMPARE[sign](middle, times) else "**no**"
    return f"| {text} | {_figure(middle)} | {_figure(min(ratios))} - {_figure(max(ratios))} | {holds} |"


def _find(records: Iterable[Record], system: str, tokens: int) -> Record | None:
    found = (r for r in records if (r["system"], r["tokens"], r["ids"]) == (system, tokens, "uniform"))
    return next((r for r in found if r["p50_ms"] is not None), None)


def _find_workers(records: Iterable[Record], workers: int, clients: int) -> Record | None:
    found = (r for r in records if (r.get("workers"), r.get("clients")) == (workers, clients))
    return next((r for r in found if r["p50_ms"] is not None), None)


def _ratios(record: Record | None, other: Record | None, measure: str) -> list[float]:
    if record is None or other is None:
        return []
    if measure == "server CPU/GB":
        key = "server_cpu_s_per_gb"
        return [record[key] / other[key]] if record[key] and other[key] else []
    key = "gb_per_s_rounds" if measure == "GB/s" else "p50_ms_rounds"
    mine, theirs = record[key], other[key]
    if len(mine) != len(theirs):  # slow calls are made in the first round only
        mine, theirs = [statistics.median(mine)], [statistics.median(theirs)]
    ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
    return [1 / ratio for ratio in ratios] if measure == "tokens/s" else ratios


def _median_ratio(record: Record, other: Record | None, key: str) -> float | None:
    if other is None or len(record[key]) != len(other[key]):
        return None if other is None else record["p50_ms"] / other["p50_ms"]
    return statistics.median(a / b for a, b in zip(record[key], other[key], strict=True))


def _figure(value: float | None) -> str:
    """Three digits, never in powers of ten."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}" if value else "0"


def plots(records: Sequence[Record], directory: Path) -> None:
    """Write latency.png, throughput.png, table-size.png and workers.png, as far as there is something to show."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    batches = [r for r in records if r["study"] == "batches" and r["ids"] == "uniform" and r["p50_ms"] and r["rows"]]
    systems = list(dict.fromkeys(record["system"] for record in batches))

    def figure(name: str, x: str, y: str, lines: dict[str, list[tuple[float, float]]], log: bool) -> None:
        if not any(lines.values()):
            return
        drawing, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
        for number, (label, points) in enumerate(lines.items()):
            if not points:
                continue
            ours = label.startswith("engrampool")
            style = {"linewidth": 2.5 if ours else 1.2, "marker": "osD^v<>psXh*+"[number % 13], "markersize": 5}
            axes.plot(*zip(*sorted(points), strict=True), label=label, color=f"C{number % 10}", **style)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(alpha=0.3)
        if log:
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(sorted({size for points in lines.values() for size, _ in points}))
            axes.xaxis.set_major_formatter("{x:.0f}")
            axes.yaxis.set_major_formatter("{x:g}")
        else:
            axes.set_ylim(bottom=0)
        axes.legend(fontsize="small")
        drawing.savefig(directory / name, dpi=110)
        pyplot.close(drawing)

    def by_tokens(value: Callable[[Record], float]) -> dict[str, list[tuple[float, float]]]:
        return {s: [(r["tokens"], value(r)) for r in batches if r["system"] == s] for s in systems}

    tokens = "tokens a call (24 rows of 264 B a layer, 2 layers)"
    figure("latency.png", tokens, "p50 ms", by_tokens(lambda r: r["p50_ms"]), True)
    figure("throughput.png", tokens, "GB/s", by_tokens(lambda r: r["gb_per_s"]), True)
    sized = [r for r in records if r["study"] == "tables" and r["p50_ms"]]
    lines = {
        name: [(r["table_rows"] * 264 / 1e9, r["rows"] / r["p50_ms"] / 1e3) for r in sized if r["peer"] == name]
        for name in dict.fromkeys(r["peer"] for r in sized)
    }
    for number, name in enumerate(("gather kernel", "np.take by itself")):
        times = ((size, both[number]) for (size, width), both in _gathers(records).items() if width == 264)
        lines[name] = [(size, 1e3 / nanoseconds) for size, nanoseconds in times]
    figure("table-size.png", "GB of tables", "million rows/s", lines, False)
    several = [r for r in records if r["study"] == "workers" and r["p50_ms"]]
    lines = {
        f"engrampool-grpc, {n} clients": [(r["workers"], r["gb_per_s"]) for r in several if r["clients"] == n]
        for n in dict.fromkeys(r["clients"] for r in several)
    }
    figure("workers.png", "workers", "GB/s of all clients", lines, False)
