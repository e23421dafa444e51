"""Processor time of a lookup, and what follows from it for more cores and more machines: `python bench/cores.py`.

A server with one worker and a client of it, on this machine: lookups of both layers by row ids (uniform), a fixed
number of calls a round, the ways in turn. What is taken is the processor time of the worker's process and of this one,
not the time of day; medians of the rounds. Then the tables that follow from these. Prints Markdown. With `--table`
nothing is measured, and the figures are those that stand in docs/SCALING.md.
"""

import argparse
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engrampool_client import Client
from engrampool_client.testing import serve_process
from processes import cpu_s
from workload import ROW_BYTES, Workload

PAGE = Path(__file__).parent.parent / "docs" / "SCALING.md"
TOKEN_ROWS = 48  # of DeepSeek-V4.1
# Of each size a round; so many that the system's clock of processor time, which counts hundredths, is exact enough.
CALLS = {1: 5000, 16: 3000, 64: 2000, 1024: 200}
LINKS_GB_S = {25: 2.9, 100: 11.6, 400: 47.0}  # payload of Gb/s
CORES = (16, 32, 64)
NODES = (1, 8, 64)
DRAM_GB_S = 200.0
# A row lies in 5.1 lines of 64 bytes, is written once, and read once by the network card.
DRAM_BYTES_A_ROW = 5.1 * 64 + 2 * ROW_BYTES
ENGINES_TOKENS_S = (100_000, 1_000_000, 10_000_000)


@dataclass(frozen=True)
class Load:
    """Lookups of so many tokens, of whose rows `share` is asked for, by bench/cache.py."""

    name: str
    tokens: int
    share: float


PREFILL, PREFILL_CACHED = Load("prefill", 8192, 0.632), Load("prefill, cache of 5 %", 8192, 0.449)
DECODE, DECODE_CACHED = Load("decode", 64, 0.994), Load("decode, cache of 5 %", 64, 0.481)


@dataclass(frozen=True)
class Cost:
    """Processor seconds of a call by the rows it asks for, of the sizes that were measured."""

    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    def of(self, rows: float) -> float:
        """Between two sizes on the line from one to the other, above the largest in proportion."""
        beyond = max(1.0, rows / self.rows[-1])
        return float(np.interp(rows, self.rows, self.seconds)) * beyond


@dataclass(frozen=True)
class Figures:
    """What was measured, by way: gRPC, direct, attached."""

    server: Mapping[str, Cost]
    client: Mapping[str, Cost]

    def lines(self) -> Iterator[str]:
        """The table that `read` reads."""
        yield "| way | tokens | rows | server us | rows/s a core | GB/s a core | client us | client s/GB |"
        yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
        for way, client in self.client.items():
            for at, rows in enumerate(client.rows):
                cells = [way, str(rows // TOKEN_ROWS), str(rows)]
                if way in self.server:
                    seconds = self.server[way].seconds[at]
                    a_second = rows / seconds
                    cells += [f"{seconds * 1e6:.0f}", f"{a_second / 1e6:.2f} M", f"{a_second * ROW_BYTES / 1e9:.2f}"]
                else:
                    cells += ["-"] * 3
                seconds = client.seconds[at]
                cells += [f"{seconds * 1e6:.0f}", f"{seconds * 1e9 / (rows * ROW_BYTES):.2f}"]
                yield f"| {' | '.join(cells)} |"

    @classmethod
    def read(cls, page: str) -> "Figures":
        """The figures of the page's first table."""
        server: dict[str, dict[int, float]] = {}
        client: dict[str, dict[int, float]] = {}
        for line in page.partition("| way |")[2].splitlines()[2:]:
            if not line.startswith("|"):
                break
            way, _, rows, server_us, _, _, client_us, _ = (cell.strip() for cell in line.strip("|").split("|"))
            client.setdefault(way, {})[int(rows)] = float(client_us) / 1e6
            if server_us != "-":
                server.setdefault(way, {})[int(rows)] = float(server_us) / 1e6
        return cls(
            *({way: Cost(tuple(of), tuple(of.values())) for way, of in side.items()} for side in (server, client))
        )


def capacity(cost: Cost, load: Load, nodes: int, link: int, cores: int) -> tuple[float, str]:
    """Tokens/s of a model whose rows are spread over the nodes, and what bounds them: n(etwork), c(ores), m(emory)."""
    rows = load.tokens * load.share * TOKEN_ROWS / nodes
    calls = {
        "n": LINKS_GB_S[link] * 1e9 / (rows * ROW_BYTES),
        "c": cores / cost.of(rows),
        "m": DRAM_GB_S * 1e9 / (rows * DRAM_BYTES_A_ROW),
    }
    bound = min(calls, key=calls.__getitem__)
    return calls[bound] * load.tokens, bound


def tables(figures: Figures) -> Iterator[str]:
    """What nodes serve, and what engines need: lines of Markdown."""
    headings = " | ".join(f"{link} Gb/s: {' / '.join(map(str, CORES))} cores" for link in LINKS_GB_S)
    yield f"| way | load | nodes | {headings} |"
    yield "| --- | --- | ---: |" + " ---: |" * len(LINKS_GB_S)
    for way, cost in figures.server.items():
        for load in (PREFILL, DECODE):
            for nodes in NODES:
                cells = []
                for link in LINKS_GB_S:
                    found = [capacity(cost, load, nodes, link, cores) for cores in CORES]
                    texts = [f"{_two_digits(tokens / 1e6)} {bound}" for tokens, bound in found]
                    cells.append(" / ".join(texts) if len(set(texts)) > 1 else texts[0])
                yield f"| {way} | {load.name} | {nodes} | {' | '.join(cells)} |"
    yield ""
    yield (
        "| engines' tokens/s | load | GB/s | nodes by network: 25 / 100 / 400 Gb/s | server cores: gRPC / direct | "
        "engines' cores: gRPC / direct / attached |"
    )
    yield "| ---: | --- | ---: | ---: | ---: | ---: |"
    for tokens in ENGINES_TOKENS_S:
        for load in (PREFILL, PREFILL_CACHED, DECODE, DECODE_CACHED):
            rows, calls = load.tokens * load.share * TOKEN_ROWS, tokens / load.tokens
            gb_s = rows * calls * ROW_BYTES / 1e9
            nodes = " / ".join(str(math.ceil(gb_s / payload)) for payload in LINKS_GB_S.values())
            server, client = (
                " / ".join(_two_digits(calls * cost.of(rows)) for cost in side.values())
                for side in (figures.server, figures.client)
            )
            yield f"| {tokens:,} | {load.name} | {_two_digits(gb_s)} | {nodes} | {server} | {client} |"


def _two_digits(value: float) -> str:
    return f"{float(f'{value:.2g}'):g}"


def measure(data: Path, vocab_size: int, rounds: int) -> Figures:
    """Ask servers of both layers' rows, and take the processor time of either side."""
    workload = Workload.make(data, vocab_size)
    with ExitStack() as stack:
        memory = tempfile.mkdtemp(prefix="engrampool-bench-", dir="/dev/shm")
        stack.callback(shutil.rmtree, memory)
        asked = stack.enter_context(serve_process(workload.packed, workers=1))
        mapped = stack.enter_context(serve_process(workload.packed, workers=1, memory=f"file:{memory}"))
        worker = asked.worker_pids()[0]
        ways = {
            "gRPC": Client(asked.address, attach="off", direct="off", keep_memory=True),
            "direct": Client(asked.address, attach="off", spin_s=0, keep_memory=True),
            "attached": Client(mapped.address, keep_memory=True),
        }
        for client in ways.values():
            stack.enter_context(client)
        assert ways["direct"].direct, "no direct lane"
        assert ways["attached"].attached, "not attached"
        spent: dict[tuple[str, int], tuple[list[float], list[float]]] = {}
        for turn in range(rounds + 1):
            for tokens, calls in CALLS.items():
                batches = workload.batches("uniform", tokens)
                out = {n: np.zeros((tokens, len(heads), ROW_BYTES), np.uint8) for n, heads in workload.heads.items()}
                for way, client in ways.items():
                    before, mine_before = cpu_s(worker), time.process_time()
                    for _ in range(calls if turn else max(1, calls // 10)):
                        batch = next(batches)
                        client.lookup_rows(batch.ids, out=out)
                    theirs, mine = cpu_s(worker) - before, time.process_time() - mine_before
                    answers = workload.answers("uniform")
                    for layer, rows in out.items():
                        assert np.array_equal(rows, answers[layer][batch.start : batch.start + tokens]), way
                    if turn:  # the first warms up
                        both = spent.setdefault((way, tokens), ([], []))
                        both[0].append(theirs / calls)
                        both[1].append(mine / calls)
    rows = tuple(tokens * TOKEN_ROWS for tokens in CALLS)

    def cost(way: str, side: int) -> Cost:
        return Cost(rows, tuple(statistics.median(spent[way, tokens][side]) for tokens in CALLS))

    return Figures({way: cost(way, 0) for way in ways if way != "attached"}, {way: cost(way, 1) for way in ways})


def main() -> None:
    """Measure unless told not to, calculate, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("bench-data"))
    parser.add_argument("--vocab-size", type=int, default=80_000, help="of each head: 48 times as many rows")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--table", action="store_true", help="calculate from the figures in docs/SCALING.md")
    chosen = parser.parse_args()
    if chosen.table:
        figures = Figures.read(PAGE.read_text())
    else:
        figures = measure(chosen.data, chosen.vocab_size, chosen.rounds)
        print("\n".join(figures.lines()), end="\n\n", flush=True)
        figures = Figures.read("\n".join(figures.lines()))  # as rounded there
    print("\n".join(tables(figures)))


if __name__ == "__main__":
    main()
