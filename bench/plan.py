"""What a server's processor takes on this machine, for `engrampool plan`; and the plan held against servers.

    python bench/plan.py --calibrate FILE      # measure, and write what `plan --calibration FILE` takes
    python bench/plan.py --check               # measure, and compare plans with one server and two under a load

The check runs a load of chunks and of decode steps on servers of 1 and 2 shards, and compares processor time and bytes
with the plan of the same load. It exits with 1 if one is off by more than 25 %. Processor time is the workers' own,
which other work on the machine changes little.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from engrampool_client import Client
from engrampool_client.testing import serve_process
from engrampool_proto.tiers.tier import Tier
from engrampool_server.files.table_files import PackedModel
from engrampool_server.memory.load_plan import Costs, LoadPlan, Traffic
from processes import cpu_s
from workload import Workload

# Tokens of a lookup whose cost is all call, and of one that is all bytes; and how many of each are a measurement.
CALIBRATE = {1: 1500, 4096: 40}
LOAD = {"prefill": (2048, 20), "decode": (64, 400)}
MOST_OFF = 0.25


@contextmanager
def cluster(workload: Workload, shards: int) -> Iterator[tuple[Client, list[int]]]:
    """Servers of so many shards, one worker each; a client of them, and the workers' process ids."""
    with ExitStack() as stack:
        servers = [
            stack.enter_context(serve_process(workload.packed, workers=1, shard=f"{at}/{shards}"))
            for at in range(shards)
        ]
        addresses = [server.address for server in servers]
        client = stack.enter_context(Client(addresses, attach="off", connections=1, spin_s=0, dedupe=False))
        assert client.direct, "no direct lane"
        yield client, [server.worker_pids()[0] for server in servers]


def spent(workload: Workload, client: Client, workers: list[int], load: Mapping[int, int]) -> float:
    """Seconds of processor that the workers take for lookups of these sizes, as many as said."""
    before = sum(map(cpu_s, workers))
    for tokens, calls in load.items():
        batches = workload.batches("uniform", tokens)
        for _ in range(calls):
            client.lookup_rows(next(batches).ids)
    return sum(map(cpu_s, workers)) - before


def calibrated(workload: Workload, rounds: int, share: float = 1.0) -> dict[str, float]:
    """call_us and s_per_gb, as `plan` takes them: the medians of so many rounds, after one that warms up."""
    found: dict[int, list[float]] = {tokens: [] for tokens in CALIBRATE}
    with cluster(workload, 1) as (client, workers):
        for turn in range(rounds + 1):
            for tokens, most in CALIBRATE.items():
                calls = max(1, round(most * share))
                seconds = spent(workload, client, workers, {tokens: calls}) / calls
                if turn:
                    found[tokens].append(seconds)
    (few, few_s), (many, many_s) = ((tokens, statistics.median(each)) for tokens, each in found.items())
    token_gb = workload.token_bytes / 1e9
    s_per_gb = (many_s - few_s) / ((many - few) * token_gb)
    return {"call_us": round((few_s - few * token_gb * s_per_gb) * 1e6, 1), "s_per_gb": round(s_per_gb, 4)}


def compared(
    workload: Workload, costs: Mapping[str, float], shards: int, rounds: int, share: float = 1.0
) -> dict[str, float]:
    """Processors in use and GB/s, as planned and as measured, of a load on so many servers."""
    cores, gb_per_s, planned_cores, planned_gb = [], [], [], []
    with PackedModel.open(workload.packed) as files:
        spec = files.spec
    with cluster(workload, shards) as (client, workers):
        for turn in range(rounds + 1):
            bytes_before, begin = client.stats.bytes["wire"], time.perf_counter()
            load = {phase: (tokens, max(1, round(most * share))) for phase, (tokens, most) in LOAD.items()}
            cpu = spent(workload, client, workers, dict(load.values()))
            seconds = time.perf_counter() - begin
            traffic = {
                phase: Traffic(tokens_per_s=tokens * calls / seconds, batch=tokens, asked=1.0)
                for phase, (tokens, calls) in load.items()
            }
            plan = LoadPlan(
                spec=spec,
                shards=shards,
                replicas=1,
                memory_bytes=0,
                traffic=traffic,
                link=Tier.of("tcp-100g"),
                layers=None,
                hosts=1,
                costs=Costs(call_s=costs["call_us"] / 1e6, s_per_gb=costs["s_per_gb"], gib_price=1.0, server_price=0.0),
            )
            if turn:
                cores.append(cpu / seconds)
                gb_per_s.append((client.stats.bytes["wire"] - bytes_before) / 1e9 / seconds)
                planned_cores.append(plan.cores)
                planned_gb.append(plan.gb_per_s)
    return {
        "shards": shards,
        "cores": round(statistics.median(cores), 3),
        "planned_cores": round(statistics.median(planned_cores), 3),
        "gb_per_s": round(statistics.median(gb_per_s), 3),
        "planned_gb_per_s": round(statistics.median(planned_gb), 3),
    }


def off(found: Mapping[str, float]) -> float:
    """By how much the plan misses what was measured, at most, as a share of that."""
    return max(abs(found[f"planned_{what}"] / found[what] - 1) for what in ("cores", "gb_per_s"))


def main() -> int:
    """Measure, and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("bench-data"))
    parser.add_argument("--vocab-size", type=int, default=80_000, help="of each head: 48 times as many rows")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--share", type=float, default=1.0, help="of the lookups of a round")
    parser.add_argument("--calibrate", type=Path, metavar="FILE", help="write what `plan --calibration FILE` takes")
    parser.add_argument("--check", action="store_true", help="compare plans with servers")
    chosen = parser.parse_args()
    workload = Workload.make(chosen.data, chosen.vocab_size)
    costs = calibrated(workload, chosen.rounds, chosen.share)
    print(json.dumps(costs), flush=True)
    if chosen.calibrate is not None:
        chosen.calibrate.write_text(json.dumps(costs) + "\n")
    if not chosen.check:
        return 0
    worst = 0.0
    for shards in (1, 2):
        found = compared(workload, costs, shards, chosen.rounds, chosen.share)
        worst = max(worst, off(found))
        print(json.dumps(found | {"off": round(off(found), 3)}), flush=True)
    return 1 if worst > MOST_OFF else 0


if __name__ == "__main__":
    sys.exit(main())
