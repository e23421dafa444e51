"""Memory that is emulated: `python bench/tiers.py`. With `--check`, the emulation against its own settings.

Tables of V4.1's layout are read as from each preset of `engrampool serve --emulate` in turn: attached, by the client
itself, and over the direct lane of a server whose memory is such. A model's clock (prefill of 8192 tokens in 200 ms,
decode of 64 sequences in 12 ms, 40 layers; `--prefill-ms`, `--decode-ms`) says when each layer wants its rows. Token
ids are uniform, so hardly a row is asked for twice. `--plot FILE` draws what layers wait.
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
    print("| way | set | tokens | set, ms | took, ms: p50 | ratio |\n| --- | --- | ---: | ---: | ---: | ---: |")
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
                set_s, took_s = tier.alone_s(nbytes), statistics.median(took[WARM_UP:])
                ratio = took_s / set_s
                good &= abs(ratio - 1) <= WITHIN
                print(f"| {way} | {name} | 64 | {set_s * 1e3:.2f} | {took_s * 1e3:.2f} | {ratio:.3f} |", flush=True)
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


def cell(margin: dict[str, float]) -> str:
    """For people."""
    word = "hidden" if margin["high"] >= 0 else "at times" if margin["p50"] >= 0 else "waits"
    return f"{word} {margin['p50']:+.1f} / {margin['high']:+.1f}"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """What each layer waits at the median: a bar for each, one under the other."""
    columns = [*rows[0]["margins"]]
    longest = max(1.0, *(-one["p50"] for row in rows for one in row["margins"].values()))
    line, left, width = 13, 190, 420
    height = 40 + len(rows) * (len(columns) * line + 8)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 70}" height="{height}">',
        "<style>text { font: 11px monospace }</style>",
        '<text x="8" y="16">Emulated, not measured on such hardware: ms that a layer waits for its rows, p50</text>',
    ]
    y = 36
    for row in rows:
        parts.append(f'<text x="8" y="{y + 9}">{row["tier"]}, {row["way"]}</text>')
        for name in columns:
            waits = max(0.0, -row["margins"][name]["p50"])
            color = "#1565c0" if name.startswith("prefill") else "#ef6c00"
            parts.append(
                f'<rect x="{left}" y="{y}" width="{max(1, waits / longest * width):.1f}" height="{line - 3}" '
                f'fill="{color}"/><text x="{left + max(1, waits / longest * width) + 4:.1f}" y="{y + 9}">'
                f"{name}: {waits:.1f}</text>"
            )
            y += line
        y += 8
    path.write_text("\n".join([*parts, "</svg>"]) + "\n")


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("bench-data"))
    parser.add_argument("--vocab-size", type=int, default=80_000, help="of each head: 48 times as many rows")
    parser.add_argument("--model", type=Path, help="a packed model of V4.1's layout, in their place")
    parser.add_argument("--check", action="store_true", help="whether lookups take what a tier says; 1 if not")
    parser.add_argument("--calls", type=int, default=20, help="of each, with --check")
    parser.add_argument("--tiers", default=",".join(preset_names()), help="presets or files, by commas")
    parser.add_argument("--prefill-ms", type=float, default=200.0)
    parser.add_argument("--decode-ms", type=float, default=12.0)
    parser.add_argument("--percentile", type=float, default=99.0)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each phase")
    parser.add_argument("--plot", type=Path)
    chosen = parser.parse_args()
    packed = chosen.model or Workload.make(chosen.data, chosen.vocab_size).packed
    print(f"{report.machine()}\n")
    with tempfile.TemporaryDirectory() as segments:
        if chosen.check:
            raise SystemExit(0 if check(packed, segments, chosen.calls) else 1)
        clocks = {
            "prefill": Clock.even(chosen.prefill_ms / 1e3, LAYERS, PREFILL_TOKENS, scales=True),
            "decode": Clock.even(chosen.decode_ms / 1e3, LAYERS, DECODE_TOKENS, scales=False),
        }
        rows: list[dict[str, Any]] = []
        for way in ("attached", "direct"):
            for name in (None, *chosen.tiers.split(",")):
                with asking(packed, way, name, segments) as client:
                    margins = look(client, clocks, chosen.seconds, chosen.percentile)
                if not rows:
                    heads = " | ".join(margins)
                    print(f"| memory, emulated | way | {heads} |\n| --- | --- |{' ---: |' * len(margins)}")
                tier = name or "as it is (not emulated)"
                rows.append({"tier": tier, "way": way, "margins": margins})
                print(f"| {tier} | {way} | {' | '.join(map(cell, margins.values()))} |", flush=True)
    if chosen.plot:
        plot(rows, chosen.plot)


if __name__ == "__main__":
    main()
