"""Lookups that are given up in every way while servers freeze, die and the process forks: nothing is left, or wrong.

    python tests/sweep.py --minutes 20 --seed 7

goes on with one seed after the other; tests/integration/test_sweep.py does a few of them.

    python tests/sweep.py --storms 1000

has Ctrl-C come again and again in lookups over shards; tests/client/lanes/test_split.py does that for less long.
"""

import argparse
import asyncio
import faulthandler
import gc
import os
import random
import signal
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from engrampool_client import AsyncClient, Client, EngrampoolError, ForkedError, Step
from engrampool_client.testing import ServerProcess, serve_process
from engrampool_proto.hashing import TokenBatch
from engrampool_proto.spec import ModelSpec
from engrampool_proto.synthetic import synthetic_rows
from forks import BEGUN, forked
from small_model import small_spec, write_model

LIMIT_S = 60.0
# The ways to a server, and what else makes another path through the client. Short answers and long ones by any of them.
CLIENTS: dict[str, dict[str, Any]] = {
    "direct": {"attach": "off"},
    "direct, masked, cache": {"attach": "off", "on_failure": "mask", "cache_bytes": 4 << 20},
    "direct, masked, as it is": {"attach": "off", "on_failure": "mask", "dedupe": False, "max_steps": 2},
    "grpc, masked": {"attach": "off", "direct": "off", "on_failure": "mask"},
    "grpc, cache": {"attach": "off", "direct": "off", "cache_bytes": 4 << 20, "max_steps": 1},
    "direct, split": {"attach": "off", "connections": 2, "dedupe": False},
    "attached, masked": {"on_failure": "mask", "dedupe": False},
    "hashed there": {"attach": "off", "hashing": "server", "on_failure": "mask"},
}
# Of several shards, by which a lookup goes on in threads beside the caller's.
SHARDED: dict[str, dict[str, Any]] = {
    "shards, direct": {"attach": "off"},
    "shards, grpc": {"attach": "off", "direct": "off"},
    "shards, grpc, split": {"attach": "off", "direct": "off", "connections": 2},
    "shards, grpc, masked": {"attach": "off", "direct": "off", "on_failure": "mask", "dedupe": False},
    "shards, attached": {},
}
SIZES = (1, 8, 64, 300, 1500)


class Sweep:
    """One server, a client of each kind, and `rounds` lookups that meet what a seed has for them.

    seen: how often what happened. Raises AssertionError for a row that is wrong, a step that does not end, an array
    that is written into too late, or bytes that stay pending.
    """

    def __init__(self, server: ServerProcess, spec: ModelSpec, tables: dict[int, np.ndarray], seed: int) -> None:
        self.random, self.numbers = random.Random(seed), np.random.default_rng(seed)
        self.server, self.spec, self.tables = server, spec, tables
        self.seen: Counter[str] = Counter()
        self._given_back: list[tuple[str, np.ndarray, bytes]] = []
        self._armed = False

    def run(self, rounds: int) -> None:
        with ExitStack() as stack:
            stack.enter_context(self._interrupts())
            clients = {
                name: stack.enter_context(Client(self.server.address, breaker_failures=3, retry_s=0.5, **how))
                for name, how in CLIENTS.items()
            }
            usual = {(name, size): self._usual_s(client, size) for name, client in clients.items() for size in SIZES}
            for _ in range(rounds):
                name, size = self.random.choice(list(clients)), self.random.choice(SIZES)
                trouble = self.random.choices(
                    ["none", "freeze", "kill", "fork"], [12, 3, 1, 1] if size < 1000 else [6, 3, 1, 1]
                )[0]
                self.seen[trouble] += 1
                with self._trouble(trouble, clients):
                    self._one(name, clients[name], size, usual[name, size])
            gc.collect()
            for name, client in clients.items():
                _eventually(lambda: client.stats.in_flight == 0, f"{name}: every step has ended")  # noqa: B023
                _eventually(lambda: not client.stats.pending_hint_bytes, f"{name}: every hint has ended")  # noqa: B023
                assert client.stats.pending_bytes == 0, name
                # As good as before, once the server is.
                _eventually(lambda: self._serves(client), f"{name} serves again")  # noqa: B023
        for name, array, before in self._given_back:
            assert array.tobytes() == before, f"{name}: an array was written into after it was given back"
        self._given_back.clear()

    # --- one lookup

    def _one(self, name: str, client: Client, size: int, usual_s: float) -> None:
        batch = TokenBatch.of(self.numbers.integers(0, self.spec.vocab_size, size).astype(np.int32))
        ids = self.spec.hash(batch)
        out = self._out(size)
        timeout_s = self.random.choice([usual_s * self.random.uniform(0.3, 1.6), 1e-6, 2.0, 20.0, float("inf")])
        how = {"out": out, "timeout_s": timeout_s}
        kinds = ["prefetch", "prefetch", "lookup", "await", "interrupt"]
        kind = self.random.choice(kinds)
        by_rows = client.status()["hashing"] == "local" and self.random.random() < 0.3
        self.seen[kind] += 1
        what: Any = ids if by_rows else batch.tokens
        try:
            if kind == "prefetch":
                start = client.prefetch_rows if by_rows else client.prefetch
                self._prefetched(client, start(what, ahead=self.random.random() < 0.3, **how), ids, out, usual_s)
            elif kind == "await":
                asyncio.run(self._awaited(client, by_rows, what, how, usual_s, ids))
            else:
                if kind == "interrupt":
                    self._arm(usual_s * self.random.uniform(0.0, 1.5))
                look_up = client.lookup_rows if by_rows else client.lookup
                self._check(ids, {layer: (rows, None) for layer, rows in look_up(what, **how).items()}, client)
                self.seen["ok"] += 1
        except (EngrampoolError, TimeoutError) as error:
            self.seen[type(error).__name__] += 1
        except KeyboardInterrupt:
            self.seen["interrupted"] += 1
        finally:
            self._armed = False
        for layer, array in (out or {}).items():
            self._given_back.append((f"{name}, layer {layer}, {kind}", array, array.tobytes()))

    def _prefetched(
        self, client: Client, step: Step, ids: dict[int, np.ndarray], out: dict[int, np.ndarray] | None, usual_s: float
    ) -> None:
        told: list[int] = []
        act = self.random.choice(["wait", "wait", "wait", "cancel", "drop", "leave", "first", "amend"])
        self.seen[act] += 1
        if self.random.random() < 0.3 and act not in ("drop", "first"):  # one that has a callback is not dropped
            step.add_callback(lambda _, layer: told.append(layer))
        if client.cache is not None and self.random.random() < 0.3 and step._hint is not None:
            step.hint([[int(token) for token in self.numbers.integers(0, self.spec.vocab_size, 3)]])
        if act in ("cancel", "drop", "amend"):
            time.sleep(usual_s * self.random.uniform(0.0, 1.2))
        if act == "drop":
            del step
            gc.collect()
            return
        if act == "cancel":
            step.cancel()
            assert step.done()
        elif act == "amend" and step._hint is not None:
            tokens = self.numbers.integers(0, self.spec.vocab_size, 10).astype(np.int32)
            after = client.amend(step, tokens, timeout_s=5.0)
            wanted = self.spec.hash(TokenBatch.of(tokens))
            self._check(wanted, {layer: (after.rows(layer), after.valid(layer)) for layer in after.layers}, client)
            step.cancel()
        elif act == "leave" and step.deadline < time.monotonic() + 5:
            _eventually(step.done, "a step that nobody waits for is settled")
        elif act == "first":
            step.rows(step.layers[0])
            return
        else:
            try:
                step.wait(LIMIT_S)
            finally:
                if not step.done():
                    step.cancel()
        assert step.done()
        came = {layer: (step.rows(layer), step.valid(layer)) for layer in step.layers if layer in step.delivery.rows}
        self._check(ids, came, client)
        if out is not None:
            assert all(came[layer][0] is out[layer] for layer in came)
        assert set(told) <= set(step.layers)
        assert len(told) == len(set(told))

    async def _awaited(
        self, client: Client, by_rows: bool, what: Any, how: dict[str, Any], usual_s: float, ids: dict[int, np.ndarray]
    ) -> None:
        pool = AsyncClient(client)
        lookup = (pool.lookup_rows if by_rows else pool.lookup)(what, **how)
        rows = await asyncio.wait_for(lookup, self.random.choice([usual_s * self.random.uniform(0.1, 1.5), LIMIT_S]))
        self._check(ids, {layer: (given, None) for layer, given in rows.items()}, client)

    def _out(self, size: int) -> dict[int, np.ndarray] | None:
        if self.random.random() < 0.5:
            return None
        tables = [self.spec.table(layer) for layer in self.spec.layers]
        return {table.layer: np.full((size, table.heads, table.row_bytes), 0xA5, np.uint8) for table in tables}

    def _check(
        self, ids: dict[int, np.ndarray], came: dict[int, tuple[np.ndarray, np.ndarray | None]], client: Client
    ) -> None:
        for layer, (rows, valid) in came.items():
            wanted = self.tables[layer][ids[layer]]
            if valid is None:  # of a lookup that masks, tokens without rows have zeros, and no row is all zero
                valid = (
                    rows.reshape(len(rows), -1).any(axis=1)
                    if client.status()["on_failure"] == "mask"
                    else np.ones(len(rows), np.bool_)
                )
            assert np.array_equal(rows[valid], wanted[valid]), f"layer {layer}: wrong rows"
            assert not rows[~valid].any(), f"layer {layer}: rows of tokens that have none"

    def _usual_s(self, client: Client, size: int) -> float:
        took = []
        for _ in range(3):
            begin = time.perf_counter()
            client.prefetch(self.numbers.integers(0, self.spec.vocab_size, size).astype(np.int32)).wait()
            took.append(time.perf_counter() - begin)
        return statistics.median(took)

    def _serves(self, client: Client) -> bool:
        tokens = self.numbers.integers(0, self.spec.vocab_size, 20).astype(np.int32)
        step = client.prefetch(tokens, timeout_s=5.0)
        try:
            step.wait()
        except EngrampoolError:
            return False
        self._check(
            self.spec.hash(TokenBatch.of(tokens)), {at: (step.rows(at), step.valid(at)) for at in (1, 14)}, client
        )
        return step.error is None

    # --- trouble

    @contextmanager
    def _trouble(self, kind: str, clients: dict[str, Client]) -> Iterator[None]:
        if kind == "fork":
            self._fork(clients)
        if kind != "freeze" and kind != "kill":
            yield
            return
        begun = threading.Event()

        def strike() -> None:
            begun.set()
            pids = list(self.server.worker_pids().values())
            if kind == "kill":
                time.sleep(self.random.uniform(0, 0.01))
                _signal(self.random.choice(pids), signal.SIGKILL)
                return
            for pid in pids:
                _signal(pid, signal.SIGSTOP)
            time.sleep(self.random.uniform(0, 0.3))
            for pid in pids:
                _signal(pid, signal.SIGCONT)

        thread = threading.Thread(target=strike)
        thread.start()
        begun.wait()
        try:
            yield
        finally:
            thread.join()

    def _fork(self, clients: dict[str, Client]) -> None:
        """In the midst of a lookup: the child gets nobody's rows, and takes nothing from the parent."""
        client = self.random.choice(list(clients.values()))
        step = client.prefetch(np.arange(300, dtype=np.int32), timeout_s=20.0)

        def run() -> bytes:
            nonlocal step
            refused = 0
            for ask in (lambda: client.prefetch([1]), lambda: client.lookup([1])):
                try:
                    ask()
                except ForkedError:
                    refused += 1
            with suppress(EngrampoolError):  # ForkedError, or what it had ended with in the parent
                step.wait()
            good = refused == 2 and step.done()
            client.close()
            del step
            gc.collect()
            return b"K" if good else b"R%d" % refused

        said, ended, by_others = forked(run)
        if by_others:
            # Handlers of forks, gRPC's and Python's own, end a child now and then before any line of it has run, and so
            # do threads that gRPC begins there.
            self.seen["child ended by gRPC"] += 1
            assert 2 * self.seen["child ended by gRPC"] <= 4 + self.seen["fork"]
        else:
            assert said == BEGUN + b"K", (said, ended)
        with suppress(EngrampoolError):
            step.wait(LIMIT_S)
        assert not isinstance(step.error, ForkedError)

    @contextmanager
    def _interrupts(self) -> Iterator[None]:
        """Ctrl-C in the main thread, by a signal that nobody else uses."""

        def interrupt(*_: object) -> None:
            if self._armed:
                self._armed = False
                raise KeyboardInterrupt

        signal.signal(signal.SIGUSR2, interrupt)
        try:
            yield
        finally:
            # By default it ends the process, and the last one that was asked for may be late.
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)

    def _arm(self, after_s: float) -> None:
        self._armed = True
        timer = threading.Timer(after_s, signal.pthread_kill, (threading.main_thread().ident, signal.SIGUSR2))
        timer.daemon = True
        timer.start()


class Storm:
    """Ctrl-C in the main thread within `Client.lookup`, `count` times from `first_s` on. To be used in `with`.

    Raises AssertionError there if the lookup does not end within LIMIT_S.
    """

    def __init__(self, first_s: float = 1.0, interval_s: float = 1.0, count: int = 0) -> None:
        self._first_s, self._interval_s, self._left = first_s, interval_s, count
        self._limit = time.monotonic() + LIMIT_S

    def __enter__(self) -> None:
        signal.signal(signal.SIGALRM, self._strike)
        signal.setitimer(signal.ITIMER_REAL, self._first_s)

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _strike(self, _: int, frame: FrameType | None) -> None:
        names = []
        while frame is not None and frame.f_code is not Client.lookup.__code__:
            names.append(frame.f_code.co_name)
            frame = frame.f_back
        # What is raised in the end of an object is lost to all but the log.
        within = frame is not None and "__del__" not in names and "_remove" not in names
        assert not within or time.monotonic() < self._limit, f"a lookup does not end; it is in {names}"
        strikes = within and self._left > 0
        self._left -= strikes
        # Armed anew each time, at the end: where signals come faster than this runs, nothing else ever would.
        signal.setitimer(signal.ITIMER_REAL, self._interval_s if self._left else 1.0)
        if strikes:
            raise KeyboardInterrupt


def storms(directory: Path, count: int, seed: int) -> Counter[str]:
    """So many lookups over two shards that meet a storm of Ctrl-C, each followed by one that does not: what happened.

    Raises AssertionError for one that does not end, wrong rows, or an array that is written into too late.
    """
    chance, numbers, spec, seen = random.Random(seed), np.random.default_rng(seed), small_spec(), Counter[str]()
    packed = write_model(directory / "model", spec)
    tables = {table.layer: synthetic_rows(table, np.arange(table.num_rows, dtype=np.uint64)) for table in spec.tables}
    (directory / "tables").mkdir()
    batches = [
        TokenBatch.of(numbers.integers(0, spec.vocab_size, size).astype(np.int32)) for size in SIZES for _ in range(3)
    ]
    wanted = [{layer: tables[layer][ids] for layer, ids in spec.hash(batch).items()} for batch in batches]
    with ExitStack() as stack:
        memory = f"file:{directory / 'tables'}"
        servers = [
            stack.enter_context(serve_process(packed, workers=1, shard=f"{at}/2", memory=memory)) for at in range(2)
        ]
        addresses = [server.address for server in servers]
        clients = {name: stack.enter_context(Client(addresses, **how)) for name, how in SHARDED.items()}
        for number in range(count):
            name, client = list(clients.items())[number % len(clients)]
            at = chance.randrange(len(batches))
            tokens, right = batches[at].tokens, wanted[at]
            out = {layer: np.full_like(rows, 0xA5) for layer, rows in right.items()}
            storm = Storm(
                10 ** chance.uniform(-5, -1.5), 10 ** chance.uniform(-5, -2.5), chance.choice([1, 2, 3, 10, 50])
            )
            try:
                with storm:
                    client.lookup(tokens, out=out, timeout_s=20.0)
                seen["ok"] += 1
            except KeyboardInterrupt:
                seen["interrupted"] += 1
            given_back = {layer: array.copy() for layer, array in out.items()}
            with Storm():
                rows = client.lookup(tokens, timeout_s=20.0)
            assert all(np.array_equal(rows[layer], right[layer]) for layer in right), f"{name}: wrong rows"
            assert all(np.array_equal(out[layer], given_back[layer]) for layer in out), f"{name}: written into later"
        gc.collect()
        for name, client in clients.items():
            _eventually(lambda: client.stats.in_flight == 0, f"{name}: every lookup has ended")  # noqa: B023
    return seen


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _eventually(condition: Callable[[], bool], what: str) -> None:
    limit = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < limit, f"it did not come to this: {what}"
        time.sleep(0.005)


@contextmanager
def served(directory: Path) -> Iterator[tuple[ServerProcess, ModelSpec, dict[int, np.ndarray]]]:
    """A server with two workers of a small model whose rows are known: spec, layer -> uint8 [num_rows, row_bytes]."""
    spec = small_spec()
    packed = write_model(directory / "model", spec)
    tables = {
        layer: synthetic_rows(spec.table(layer), np.arange(spec.table(layer).num_rows, dtype=np.uint64))
        for layer in spec.layers
    }
    (directory / "tables").mkdir()
    with serve_process(packed, workers=2, memory=f"file:{directory / 'tables'}") as server:
        yield server, spec, tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seeds", type=int, help="so many, in place of minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=100, help="lookups by each seed")
    parser.add_argument("--storms", type=int, help="so many lookups over shards that Ctrl-C comes in, and nothing else")
    options = parser.parse_args()
    faulthandler.enable()  # in children, too
    if options.storms:
        with tempfile.TemporaryDirectory() as directory:
            print(f"{options.storms} storms: {dict(storms(Path(directory), options.storms, options.seed))}")
        return
    seen: Counter[str] = Counter()
    end, seed = time.monotonic() + 60 * options.minutes, options.seed
    with tempfile.TemporaryDirectory() as directory, served(Path(directory)) as (server, spec, tables):
        while seed - options.seed < options.seeds if options.seeds else time.monotonic() < end:
            sweep = Sweep(server, spec, tables, seed)
            try:
                sweep.run(options.rounds)
            except BaseException:
                print(f"seed {seed}", flush=True)
                raise
            seen += sweep.seen
            seed += 1
    print(f"{seed - options.seed} seeds, {(seed - options.seed) * options.rounds} lookups: {dict(seen)}")


if __name__ == "__main__":
    main()
