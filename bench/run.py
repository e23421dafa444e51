"""engrampool side by side with its peers and with what bounds it: `make bench`, `make bench-quick`.

Each round starts every system's server afresh; then, size by size, each system in turn is asked by a fresh client, so
that a change of the machine's speed meets all of them. Every client first compares rows with what must come. Medians
are over rounds; ratios are taken within a round, and their median is shown.

A system that cannot run is listed with the reason. Progress goes to stderr; a Markdown report to stdout and, with
plots, to --out. It needs about 8 GB of memory, and 11 GB of disk under --data.
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import peers
import processes
import report
from workload import KINDS, POOL_TOKENS, Workload

TOKENS = (1, 16, 64, 256, 1024, 4096)
SMALL_VOCAB_SIZE, VOCAB_SIZE, LARGE_VOCAB_SIZE = 8_000, 80_000, 320_000  # tables of 0.1, 1 and 4 GB
START_S, CASE_S = 180.0, 180.0  # no server takes longer to start, no case to run
BULK_TOKENS = 1024
STUDIES = ("decode", "batches", "workers", "tables", "gather")
WORKERS, CLIENTS = (1, 2), (1, 2)

Sample = dict[str, Any]
Server = tuple[str, int | None]  # address, process


@dataclass
class Case:
    """One line of the results: what was asked of whom, and what each round found.

    why: it was not measured, or not in every round. failed: it should have been.
    """

    study: str
    system: str
    tokens: int
    kind: str
    workload: Workload
    extra: dict[str, Any] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    why: str | None = None
    failed: bool = False

    def record(self) -> dict[str, Any]:
        """As the JSON has it. Medians of the rounds; p99 of all calls."""
        layers = len(self.workload.layers)
        rows = self.tokens * sum(map(len, self.workload.heads.values()))
        empty = self.system == "grpc-empty"
        done = {
            "study": self.study,
            "system": self.system,
            "tokens": self.tokens,
            "layers": 0 if empty else layers,
            "rows": 0 if empty else rows,
            "p50_ms": None,
            "p99_ms": None,
            "gb_per_s": None,
            "server_cpu_s_per_gb": None,
            "ids": self.kind,
            "repeats": len(self.samples),
            "table_rows": self.workload.table_rows,
            **self.extra,
        }
        if self.why is not None:
            done["skipped"] = self.why
        if not self.samples:
            return done
        nbytes = 0 if empty else self.tokens * self.workload.token_bytes
        p50 = [statistics.median(sample["times"]) for sample in self.samples]
        if self.extra.get("clients", 1) == 1:
            rates = [nbytes / seconds / 1e9 for seconds in p50]
        else:  # side by side: all bytes in the time that they took together
            rates = [nbytes * len(sample["times"]) / sample["wall_s"] / 1e9 for sample in self.samples]
        times = [seconds for sample in self.samples for seconds in sample["times"]]
        gigabytes = nbytes * len(times) / 1e9
        done.update(
            p50_ms=1e3 * statistics.median(p50),
            p99_ms=1e3 * float(np.percentile(times, 99)),
            gb_per_s=statistics.median(rates),
            p50_ms_rounds=[1e3 * value for value in p50],
            gb_per_s_rounds=rates,
            calls=len(times),
        )
        for side in ("server", "client"):
            spent = [sample[f"{side}_cpu_s"] for sample in self.samples]
            known = gigabytes and None not in spent
            done[f"{side}_cpu_s_per_gb"] = sum(spent) / gigabytes if known else None
        return done


class Harness:
    """Runs cases and keeps what they found."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.cases: list[Case] = []
        self.others: list[dict[str, Any]] = []
        self._begin = time.monotonic()

    def tell(self, text: str) -> None:
        """A line of progress."""
        print(f"[{time.monotonic() - self._begin:5.0f} s] {text}", file=sys.stderr, flush=True)

    def workload(self, vocab_size: int) -> Workload:
        """The workload of a size."""
        vocab_size = min(vocab_size, self.options.vocab_size)
        self.tell(f"tables of {48 * vocab_size * 264 / 1e9:.1f} GB")
        return Workload.make(self.options.data, vocab_size, self.options.pool_tokens)

    def batches(self) -> None:
        """Every system, every size of batch."""
        ordinary, small = self.workload(VOCAB_SIZE), self.workload(SMALL_VOCAB_SIZE)
        cases: dict[tuple[str, int], list[Case]] = {}
        for system in self.options.systems:
            peer = peers.load(system)
            why = peer.missing()
            if why is not None:
                self.tell(f"{system} is left out: {why}")
            workload = small if getattr(peer, "SMALL", False) else ordinary
            empty = getattr(peer, "EMPTY", False)  # one size and kind says it all
            kinds = self.options.kinds[:1] if empty else self.options.kinds
            for tokens in (tokens for tokens in self.options.tokens if tokens == 1 or not empty):
                cases[system, tokens] = [Case("batches", system, tokens, kind, workload, why=why) for kind in kinds]
        self.cases += [case for group in cases.values() for case in group]
        for turn in range(self.options.rounds):
            with ExitStack() as stack:
                servers: dict[str, Server] = {}
                for system in self.options.systems:
                    group = [case for case in self.cases if case.system == system]
                    if group and not group[0].why:
                        with self._giving_up(group):
                            servers[system] = self._serve(stack, system, group[0].workload)
                for tokens in self.options.tokens:
                    self.tell(f"round {turn + 1} of {self.options.rounds}, {tokens} tokens")
                    # Every round begins with another system, so that none always follows the same one.
                    order = [system for system in servers if (system, tokens) in cases]
                    order = order[turn % len(order) :] + order[: turn % len(order)] if order else []
                    for system in order:
                        self._case(cases, system, tokens, servers[system])

    def _serve(self, stack: ExitStack, system: str, workload: Workload, **settings: Any) -> Server:
        if not hasattr(peers.load(system), "serve"):
            return "", None
        self.tell(f"starting {system}")
        arguments = (system, workload.directory, json.dumps(settings))
        server = stack.enter_context(processes.child("serve.py", *arguments))
        return server.hear(START_S)["address"], server.pid

    def _case(self, cases: dict[tuple[str, int], list[Case]], system: str, tokens: int, server: Server) -> None:
        group = cases[system, tokens]
        if any(case.why for case in group):
            return
        expected_s = self._expected_s(system, tokens)
        if expected_s > self.options.longest_call_s:
            for case in group:
                case.why = f"a call would take about {expected_s:.0f} s"
            return
        if any(sample["wall_s"] > 1 and len(sample["times"]) == 1 for case in group for sample in case.samples):
            return  # a slow call is made once, not once a round
        with self._giving_up(group), ExitStack() as stack:
            found = self._measured([self._client(stack, group, server)])[0]
            for case in group:
                case.samples.append(found[case.kind])

    @contextmanager
    def _giving_up(self, cases: Sequence[Case]) -> Iterator[None]:
        """What cannot be measured is told as such, and not tried again."""
        try:
            yield
        except processes.ChildError as error:
            for case in cases:
                case.why, case.failed = str(error), True
            self.tell(f"{cases[0].system}, {cases[0].tokens} tokens: {error}")

    def _expected_s(self, system: str, tokens: int) -> float:
        """How long a call will take, by the line through the two largest sizes measured so far; 0 without them."""
        seen = {c.tokens: c.samples[0]["times"] for c in self.cases if c.system == system and c.samples}
        known = sorted((size, statistics.median(times)) for size, times in seen.items() if size < tokens)[-2:]
        if len(known) < 2:
            return 0.0
        (before, before_s), (last, last_s) = known
        return last_s + (last_s - before_s) / (last - before) * (tokens - last)

    def _client(self, stack: ExitStack, group: Sequence[Case], server: Server) -> processes.Child:
        case = {
            "system": group[0].extra.get("peer", group[0].system),
            "workload": str(group[0].workload.directory),
            "tokens": group[0].tokens,
            "kinds": [case.kind for case in group],
            "seconds": self.options.seconds,
            "address": server[0],
            "server_pid": server[1],
        }
        return stack.enter_context(processes.child("measure.py", json.dumps(case)))

    @staticmethod
    def _measured(clients: Sequence[processes.Child]) -> list[dict[str, Sample]]:
        for client in clients:
            client.hear(CASE_S)
        for client in clients:
            client.say("go")
        return [client.hear(CASE_S) for client in clients]

    def workers(self) -> None:
        """One and two workers, asked by one and two clients at once; and their memory."""
        from engrampool_server.config import ServerConfig

        workload = self.workload(VOCAB_SIZE if self.options.quick else LARGE_VOCAB_SIZE)
        known = "workers" in ServerConfig.__dataclass_fields__
        cases = {}
        for workers in WORKERS:
            for clients in CLIENTS:
                extra = {"workers": workers, "clients": clients, "peer": "engrampool-grpc"}
                case = Case("workers", f"engrampool-grpc-{workers}-workers", BULK_TOKENS, KINDS[0], workload, extra)
                if not known and workers > 1:
                    case.why = "this version has no --workers"
                cases[workers, clients] = case
        self.cases += cases.values()
        for turn in range(self.options.rounds):
            self.tell(f"round {turn + 1} of {self.options.rounds}, workers")
            for workers in WORKERS:
                group = [cases[workers, clients] for clients in CLIENTS]
                if any(case.why for case in group):
                    continue
                with self._giving_up(group), ExitStack() as stack:
                    settings = {"workers": workers} if known else {}
                    server = self._serve(stack, "engrampool-grpc", workload, **settings)
                    for case in group:
                        case.samples.append(self._side_by_side(case, server))
                        assert server[1] is not None
                        case.extra["pss_bytes"] = processes.children_pss_bytes(server[1])

    def _side_by_side(self, case: Case, server: Server) -> Sample:
        with ExitStack() as stack:
            clients = [self._client(stack, [case], server) for _ in range(case.extra["clients"])]
            found = [sample[case.kind] for sample in self._measured(clients)]
        return {
            "times": [seconds for sample in found for seconds in sample["times"]],
            "wall_s": max(sample["wall_s"] for sample in found),
            "client_cpu_s": sum(sample["client_cpu_s"] for sample in found),
            "server_cpu_s": max(sample["server_cpu_s"] for sample in found),
        }

    def tables(self) -> None:
        """Tables of several sizes, at one size of batch."""
        sizes = (SMALL_VOCAB_SIZE, VOCAB_SIZE, *(() if self.options.quick else (LARGE_VOCAB_SIZE,)))
        workloads = {min(size, self.options.vocab_size): self.workload(size) for size in sizes}
        cases = {}
        for system in ("engrampool-grpc", "numpy-take"):
            for size, workload in workloads.items():
                cases[system, size] = Case(
                    "tables", f"{system}-table", BULK_TOKENS, KINDS[0], workload, {"peer": system}
                )
        self.cases += cases.values()
        for turn in range(self.options.rounds):
            self.tell(f"round {turn + 1} of {self.options.rounds}, table sizes")
            for (system, _), case in cases.items():
                if case.why:
                    continue
                with self._giving_up([case]), ExitStack() as stack:
                    server = self._serve(stack, system, case.workload)
                    found = self._measured([self._client(stack, [case], server)])[0]
                    case.samples.append(found[case.kind])

    def gather(self) -> None:
        """The server's gather beside np.take, without server or client: gather.py, in a process of its own."""
        self.tell("gather kernel")
        for record in self._found_by("gather.py", *(("--sizes", "1", "4") if self.options.quick else ())):
            if record["case"] != "gather":
                continue
            for name, nanoseconds in record["ns_per_row"].items():
                self.others.append(
                    {
                        "study": "gather",
                        "system": f"gather-{name}",
                        **dict.fromkeys(("tokens", "layers", "rows", "p50_ms", "p99_ms")),
                        "gb_per_s": record["row_bytes"] / nanoseconds,
                        "server_cpu_s_per_gb": None,
                        "ids": "uniform",
                        "repeats": 1,
                        "table_gb": record["table_gb"],
                        "row_bytes": record["row_bytes"],
                        "ns_per_row": nanoseconds,
                    }
                )

    def decode(self) -> None:
        """Lookups with the pauses of a decode step: decode.py, in a process of its own."""
        self.tell("decode steps")
        options = self.options
        vocab_size = min(SMALL_VOCAB_SIZE if options.quick else VOCAB_SIZE, options.vocab_size)
        words = ["--data", options.data, "--vocab-size", vocab_size, "--pool-tokens", options.pool_tokens]
        self.others += self._found_by("decode.py", *words, *(("--quick",) if options.quick else ()))

    @staticmethod
    def _found_by(script: str, *words: object) -> list[dict[str, Any]]:
        """What a bench of its own writes as JSON."""
        with tempfile.TemporaryDirectory() as directory:
            found = Path(directory) / "found.json"
            command = [sys.executable, str(Path(__file__).parent / script), "--json", str(found), *map(str, words)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, preexec_fn=processes.die_with_parent)
            records: list[dict[str, Any]] = json.loads(found.read_text())
            return records

    def records(self) -> list[dict[str, Any]]:
        """What was found so far, as the JSON has it."""
        return [case.record() for case in self.cases] + self.others


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""

    def listed(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
        return lambda text: [kind(word) for word in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, shorter cases, uniform ids only")
    parser.add_argument("--json", type=Path, help="write the records to this file")
    parser.add_argument("--out", type=Path, help="write results.md and the plots to this directory")
    parser.add_argument("--data", type=Path, default=Path("bench-data"), help="where tables are kept between runs")
    parser.add_argument("--systems", type=listed(str), default=list(peers.SYSTEMS), help="comma-separated names")
    parser.add_argument("--tokens", type=listed(int), default=list(TOKENS), help="comma-separated sizes of batches")
    parser.add_argument("--kinds", type=listed(str), help=f"comma-separated kinds of ids, of {', '.join(KINDS)}")
    parser.add_argument("--studies", type=listed(str), default=list(STUDIES), help=f"of {', '.join(STUDIES)}")
    parser.add_argument("--rounds", type=int, help="how often everything is repeated")
    parser.add_argument("--seconds", type=float, help="how long each case calls, in each round")
    parser.add_argument("--longest-call-s", type=float, help="leave out cases whose calls would take longer")
    parser.add_argument("--pool-tokens", type=int, default=POOL_TOKENS, help="different tokens to ask for")
    parser.add_argument("--vocab-size", type=int, default=LARGE_VOCAB_SIZE, help="rows of a head, at most")
    options = parser.parse_args(arguments)
    options.data = options.data.resolve()  # children run in another directory
    quick = options.quick
    for name, value in {
        "kinds": list(KINDS[:1] if quick else KINDS),
        "rounds": 1 if quick else 3,
        "seconds": 0.35 if quick else 0.4,
        "longest_call_s": 3.0 if quick else 15.0,
    }.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    for name, known in (("systems", peers.SYSTEMS), ("kinds", KINDS), ("studies", STUDIES)):
        unknown = [word for word in getattr(options, name) if word not in known]
        if unknown:
            parser.error(f"no such {name}: {', '.join(unknown)}; there are {', '.join(known)}")
    if max(options.tokens) > options.pool_tokens:
        parser.error(f"a batch of {max(options.tokens)} tokens does not fit in a pool of {options.pool_tokens}")
    return options


def main() -> None:
    """Run the studies, print the report, write the files."""
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that children are ended as after any other end
    harness = Harness(options)
    try:
        for study in options.studies:
            getattr(harness, study)()
    finally:
        records = harness.records()
        if options.json:
            options.json.write_text(json.dumps(records, indent=1) + "\n")
    text = report.markdown(records)
    print(text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "results.md").write_text(text)
        report.plots(records, options.out)
    harness.tell("done")
    # A peer may fail, and is listed; ours may not, and nobody may answer with wrong bytes.
    failures = [
        f"{case.system}, {case.tokens} tokens: {case.why}"
        for case in harness.cases
        if case.failed and (case.system.startswith("engrampool") or "wrong bytes" in (case.why or ""))
    ]
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
