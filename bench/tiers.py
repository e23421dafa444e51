"""Memory that is emulated: `python bench/tiers.py`. With `--check`, the emulation against its own settings.

Tables of V4.1's layout are read as from each preset of `engrampool serve --emulate` in turn: attached, by the client
itself, and over the direct lane of a server whose memory is such. A model's clock (prefill of 8192 tokens in 200 ms,
decode of 64 sequences in 12 ms, 40 layers; `--prefill-ms`, `--decode-ms`) says when each layer wants its rows. Token
ids are uniform, so hardly a row is asked for twice. `--table` only calculates
docs/TIERS.md's table, and `--plot FILE` draws it.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import report
from engrampool_client import Client
from engrampool_client.doctor.diagnosis import judge
from engrampool_client.doctor.replay import Clock, Text, phases_of_text, play
from engrampool_client.testing import serve_process
from engrampool_proto.tiers.tier import Tier, preset_names
from workload import Workload

LAYERS, PREFILL_TOKENS, DECODE_TOKENS = 40, 8192, 64
WARM_UP = 3
# What the check sets: one latency, a chain of groups, a narrow link. Each is long beside what reading takes here.
CHECKED: dict[str, dict[str, float]] = {
    "latency": {"latency_s": 20e-3, "bandwidth_gb_per_s": 100},
    "groups": {"latency_s": 20e-6, "bandwidth_gb_per_s": 100, "group_bytes": 640},
    "bandwidth": {"latency_s": 0, "bandwidth_gb_per_s": 0.04},
}
WAYS: dict[str, dict[str, Any]] = {
    "gRPC": {"attach": "off", "direct": "off"},
    "direct": {"attach": "off"},
    "attached": {},
}
WITHIN = 0.1


@contextmanager
def asking(packed: Path, way: str, tier: str | None, segments: str) -> Iterator[Client]:
    """A client by that way. tier: a preset or file, None for memory as it is."""
    attached = way == "attached"
    server_emulates = {} if tier is None or attached else {"emulate": tier}
    settings = dict(WAYS[way])
    if attached:
        settings["emulate"] = tier
    with (
        serve_process(packed, workers=1, memory=f"file:{segments}", **server_emulates) as server,
        Client(server.address, timeout_s=60, **settings) as client,
    ):
        yield client


def check(packed: Path, segments: str, calls: int) -> bool:
    """Print what a lookup's memory took beside what was set; whether all of them are near."""
    print("| way | set | set, ms | took, ms: least | p50 | least / set |\n| --- | --- | ---: | ---: | ---: | ---: |")
    good = True
    for way in WAYS:
        for name, said in CHECKED.items():
            file = Path(segments) / f"{name}.json"
            file.write_text(json.dumps(said))
            tier = Tier.of(str(file))
            with asking(packed, way, str(file), segments) as client:
                random, spec, took = np.random.default_rng(0), client.spec, []
                for _ in range(calls + WARM_UP):
                    ids = {
                        table.layer: random.integers(0, table.num_rows, (64, table.heads), table.id_dtype)
                        for table in spec.tables
                    }
                    step = client.prefetch_rows(ids)
                    step.wait()
                    took.append(step.times.total_us / 1e6)
                nbytes = sum(64 * table.heads * table.row_bytes for table in spec.tables)
                set_s, least_s, median_s = tier.alone_s(nbytes), min(took[WARM_UP:]), statistics.median(took[WARM_UP:])
                # A machine that has other work as well wakes nobody sooner, and some later.
                good &= abs(least_s / set_s - 1) <= WITHIN
                figures = [f"{seconds * 1e3:.2f}" for seconds in (set_s, least_s, median_s)]
                print(f"| {way} | {name} | {' | '.join(figures)} | {least_s / set_s:.3f} |", flush=True)
    print(f"\n{'within' if good else 'NOT within'} {WITHIN:.0%} of what was set")
    return good


def look(client: Client, clocks: dict[str, Clock], seconds: float, percentile: float) -> dict[str, dict[str, float]]:
    """By phase and layer: the margin at the median and at the percentile, in milliseconds; negative where it waits."""
    spec = client.spec
    count = PREFILL_TOKENS * 40
    tokens = np.random.default_rng(1).integers(0, spec.vocab_size, 2 * count).astype(np.int32)
    phases = phases_of_text(Text.of([tokens]), spec.lookback, PREFILL_TOKENS, DECODE_TOKENS)
    found = {}
    for name, forwards in phases.items():
        for forward in forwards[:WARM_UP]:
            forward.start(client).wait()
        played = play(client, (forwards[at] for at in range(WARM_UP, len(forwards))), clocks[name], seconds)
        for verdict in judge(played, percentile):
            found[f"{name} {verdict.layer}"] = {"p50": verdict.p50_s * 1e3, "high": verdict.margin_s * 1e3}
    return found


def calculated() -> list[dict[str, Any]]:
    """What the model of a tier gives, without a clock: of each layer when it wants rows, and when they are there."""
    row_bytes, rows = 24 * 264, []
    for preset in preset_names():
        tier, layers = Tier.of(preset), {}
        for name, tokens, total_ms in (("prefill", PREFILL_TOKENS, 200.0), ("decode", DECODE_TOKENS, 12.0)):
            for place, layer in enumerate((1, 14), 1):  # rows of the later one come behind those of the first
                there_ms = tier.alone_s(tokens * row_bytes * place) * 1e3
                layers[f"{name} {layer}"] = (total_ms * layer / LAYERS, there_ms)
        rows.append({"tier": preset, "layers": layers})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Of what was calculated."""
    heads = [f"{name}, by {due:g} ms" for name, (due, _) in rows[0]["layers"].items()]
    lines = [f"| tier | {' | '.join(heads)} |", f"| --- |{' ---: |' * len(heads)}"]
    for row in rows:
        cells = [
            f"{there:.2f} ms, {'hidden' if there <= due else f'waits {there - due:.2f}'}"
            for due, there in row["layers"].values()
        ]
        lines.append(f"| `{row['tier']}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(margin: dict[str, float]) -> str:
    """For people."""
    word = "hidden" if margin["high"] >= 0 else "at times" if margin["p50"] >= 0 else "waits"
    return f"{word} {margin['p50']:+.1f} / {margin['high']:+.1f}"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """What each layer waits, of what was calculated: a bar for each, one under the other."""
    longest = max(there - due for row in rows for due, there in row["layers"].values())
    line, left, width, y = 13, 110, 420, 34
    parts = []
    for row in rows:
        parts.append(f'<text x="8" y="{y + 9}">{row["tier"]}</text>')
        for name, (due, there) in row["layers"].items():
            bar = max(1.0, (there - due) / longest * width)
            color = "#1565c0" if name.startswith("prefill") else "#ef6c00"
            said = f"{name}: " + (f"waits {there - due:.2f}" if there > due else "hidden")
            parts.append(f'<rect x="{left}" y="{y}" width="{bar:.1f}" height="{line - 3}" fill="{color}"/>')
            parts.append(f'<text x="{left + bar + 4:.1f}" y="{y + 9}">{said}</text>')
            y += line
        y += 8
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 190}" height="{y}">',
        "<style>text { font: 11px monospace }</style>",
        f'<rect width="{left + width + 190}" height="{y}" fill="#fff"/>',
        '<text x="8" y="16">Calculated by the model, not measured on such hardware: ms that a layer waits</text>',
    ]
    path.write_text("\n".join([*head, *parts, "</svg>"]) + "\n")


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("bench-data"))
    parser.add_argument("--vocab-size", type=int, default=80_000, help="of each head: 48 times as many rows")
    parser.add_argument("--model", type=Path, help="a packed model of V4.1's layout, in their place")
    parser.add_argument("--check", action="store_true", help="whether lookups take what a tier says; 1 if not")
    parser.add_argument("--calls", type=int, default=20, help="of each, with --check")
    parser.add_argument("--tiers", default=",".join(preset_names()), help="presets or files, by commas")
    parser.add_argument("--ways", default="attached,direct", help="by commas: gRPC, direct, attached")
    parser.add_argument("--prefill-ms", type=float, default=200.0)
    parser.add_argument("--decode-ms", type=float, default=12.0)
    parser.add_argument("--percentile", type=float, default=99.0)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each phase")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--table", action="store_true", help="only calculate")
    chosen = parser.parse_args()
    if chosen.table:
        print(table(calculated()))
        if chosen.plot:
            plot(calculated(), chosen.plot)
        return
    packed = chosen.model or Workload.make(chosen.data, chosen.vocab_size).packed
    print(f"{report.machine()}\n")
    with tempfile.TemporaryDirectory() as segments:
        if chosen.check:
            raise SystemExit(0 if check(packed, segments, chosen.calls) else 1)
        clocks = {
            "prefill": Clock.even(chosen.prefill_ms / 1e3, LAYERS, PREFILL_TOKENS, scales=True),
            "decode": Clock.even(chosen.decode_ms / 1e3, LAYERS, DECODE_TOKENS, scales=False),
        }
        head = True
        for way in chosen.ways.split(","):
            for name in (None, *chosen.tiers.split(",")):
                with asking(packed, way, name, segments) as client:
                    margins = look(client, clocks, chosen.seconds, chosen.percentile)
                if head:
                    heads = " | ".join(margins)
                    print(f"| memory, emulated | way | {heads} |\n| --- | --- |{' ---: |' * len(margins)}")
                tier = name or "as it is (not emulated)"
                head = False
                print(f"| {tier} | {way} | {' | '.join(map(cell, margins.values()))} |", flush=True)


if __name__ == "__main__":
    main()
