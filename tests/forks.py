"""What the child of a fork finds of its parent's client. Run as a program, by name: `forks.py SCENARIO ...`.

Each scenario has a process of its own: in one with hundreds of tests behind it, CPython 3.11 has ended children by a
signal in `threading._after_fork`, before they came to anything.
"""

import asyncio
import faulthandler
import gc
import os
import sys
import tempfile
import time
from typing import Any

import numpy as np
import pytest

from engrampool_client import AsyncClient, Client, ForkedError, ProtocolError
from engrampool_client.testing import ServerProcess, serve_process
from engrampool_proto import frames, wire
from engrampool_proto.hashing import TokenBatch
from engrampool_proto.synthetic import synthetic_rows

# Many enough for a long answer, which comes piece by piece.
TOKENS = np.arange(3000, dtype=np.int32) * 40
FEW = TOKENS[:4]
BEGUN = b"begun "
# However long this machine stands still.
PATIENCE = {"timeout_s": 60.0, "connect_timeout_s": 60.0}
LANES = {
    "grpc": {"direct": "off", "attach": "off"},
    "direct": {"attach": "off", "cache_bytes": 1 << 20},
    "hashed there": {"hashing": "server"},
}


def expected(spec, tokens) -> dict[int, np.ndarray]:
    return {layer: synthetic_rows(spec.table(layer), ids) for layer, ids in spec.hash(TokenBatch.of(tokens)).items()}


def child(run) -> bytes:
    """What `run` gives in a fork of this process.

    Handlers of forks, gRPC's and Python's own, end a child by a signal now and then, before `run`, and so do threads
    that gRPC begins in the child: once more, then.
    """
    for _ in range(10):
        said, ended, by_others = forked(run)
        if not by_others:
            break
    return said.removeprefix(BEGUN) or f"ended with {ended} before it began".encode()


def forked(run) -> tuple[bytes, int, bool]:
    """What `run` gives in a fork, after BEGUN; how that ended; and whether it was ended by what is none of Python's."""
    read, write = os.pipe()
    with tempfile.TemporaryFile() as trace:
        pid = os.fork()
        if not pid:
            faulthandler.enable(trace.fileno())
            said = b"failed"
            os.write(write, BEGUN)
            try:
                said = run()
            finally:
                os.write(write, said)
                os._exit(0)
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            said = pipe.read()
        ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        trace.seek(0)
        text = trace.read()
    # Of a thread of Python's that is hit by a signal the trace says that it is the current one.
    return said, ended, ended < 0 and (not said or (bool(text) and b"Current thread" not in text))


def until_asking(client: Client, count: int) -> None:
    """Wait until so many steps have a place."""
    while client.status()["steps"]["asking"] != count:
        time.sleep(0.005)


def told(packed: str) -> None:
    """A child is told that the client is its parent's, and takes nothing from it, whatever lane lookups go by."""
    with serve_process(packed, workers=1) as server:
        for settings in LANES.values():
            told_by(server, settings)


def told_by(server: ServerProcess, settings: dict[str, Any]) -> None:
    with Client(server.address, **PATIENCE, **settings) as client:
        there = client.prefetch(FEW)
        there.wait()
        until_asking(client, 0)

        def run() -> bytes:
            asks = [
                lambda: client.lookup(FEW),
                lambda: client.lookup_rows({1: np.zeros((2, 24), np.uint32)}),
                lambda: client.prefetch(FEW),
                lambda: client.amend(there, FEW),
                lambda: asyncio.run(AsyncClient(client).lookup(FEW)),
                lambda: step.rows(1),
                lambda: step.wait(),
                lambda: client.save_cache("never"),
            ]
            refused = []
            for ask in asks:
                try:
                    ask()
                except Exception as error:
                    refused.append(f"{type(error).__name__} {os.getpid() if str(os.getpid()) in str(error) else 0}")
            good = refused == [f"ForkedError {os.getpid()}"] * len(asks)
            good &= "made in process" in (client.status()["why_unusable"] or "") and "made in process" in repr(client)
            # What was there is the child's as well; and giving up is of no effect on the parent.
            good &= np.array_equal(there.rows(14), expected(client.spec, FEW)[14])
            step.cancel()
            client.close()
            return b"good" if good else repr(refused).encode()

        with server.frozen():
            step = client.prefetch(TOKENS)
            until_asking(client, 1)
            assert child(run) == b"good"
        assert np.array_equal(step.rows(14), expected(client.spec, TOKENS)[14])
        assert client.stats.retries == 0
        assert np.array_equal(client.lookup(FEW)[1], expected(client.spec, FEW)[1])


def orphan(packed: str) -> None:
    """A child is told so, too, by a step whose client nobody refers to any more."""
    with serve_process(packed, workers=1) as server:
        client = Client(server.address, attach="off", **PATIENCE)
        wanted = expected(client.spec, TOKENS)[14]
        with server.frozen():
            step = client.prefetch(TOKENS)
            until_asking(client, 1)
            del client

            def run() -> bytes:
                with pytest.raises(ForkedError):
                    step.rows(14)
                return b"good"

            assert child(run) == b"good"
        assert np.array_equal(step.rows(14), wanted)


def own(address: str) -> None:
    """A child has a client of its own, and ends as processes do."""
    with Client(address, attach="off") as client:
        assert client.direct

        def run() -> bytes:
            with Client(address, attach="off") as own:
                return b"good" if np.array_equal(own.lookup(FEW)[1], expected(own.spec, FEW)[1]) else b"wrong rows"

        assert child(run) == b"good"
        assert np.array_equal(client.lookup(FEW)[14], expected(client.spec, FEW)[14])


def by_hand(address: str) -> None:
    """A child asks on its parent's connection, past all that keeps it from that: no row of its own is the parent's."""
    with Client(address, attach="off") as client:
        spec = client.spec
        good, others = expected(spec, FEW), spec.hash(TokenBatch.of(TOKENS[4:8]))
        native = client._shards.sets[0].replicas[0]._native
        for ahead in range(3):
            # Right rows, over gRPC until a connection is there again.
            while not (native._idle and native._idle[-1]._handles):
                assert np.array_equal(client.lookup(FEW)[1], good[1])
            connection = native._idle[-1]
            (handle,) = connection._handles.values()
            copy = os.dup(connection.fileno())  # before the fork, after which the child closes its end

            def run(ahead=ahead, connection=connection, handle=handle, copy=copy) -> bytes:
                ids = [wire.little(of_layer) for of_layer in others.values()]
                counts, number = [of_layer.size for of_layer in others.values()], connection.number + ahead
                start = frames.lookup_start(handle, number % 2**64, 0, counts, sum(map(len, ids)))
                os.writev(copy, [start, *ids])
                return b"good"

            assert child(run) == b"good"
            os.close(copy)
            with pytest.raises(ProtocolError, match="another request"):
                client.lookup(FEW)


def garbage(address: str) -> None:
    """A child collects nothing that its parent had; each goes on collecting garbage as it did before."""

    class Loud:
        def __del__(self) -> None:
            told.append(os.getpid())

    told: list[int] = []
    with Client(address, attach="off"):
        for collects in (True, False):
            (gc.enable if collects else gc.disable)()
            loud = Loud()
            loud.itself = loud
            del loud

            def run(collects: bool = collects) -> bytes:
                own = Loud()
                own.itself = own
                del own
                gc.collect()
                good = told.count(os.getpid()) == 1 and gc.isenabled() == collects
                return b"good" if good else repr(told).encode()

            assert child(run) == b"good"
            assert gc.isenabled() == collects
            gc.collect()
            assert told == [os.getpid()]
            told.clear()


def recording(address: str, path: str) -> None:
    """A recording is the parent's alone: two lookups of FEW are in it, whatever children do between them."""
    with Client(address, attach="off", record=path) as client:
        client.lookup(FEW)

        def run() -> bytes:
            with pytest.raises(ForkedError):
                client.lookup(FEW)
            client.close()
            return b"good"

        for _ in range(5):
            assert child(run) == b"good"
        client.lookup(FEW)


SCENARIOS = {
    "told": told,
    "orphan": orphan,
    "own": own,
    "by hand": by_hand,
    "garbage": garbage,
    "recording": recording,
}

if __name__ == "__main__":
    SCENARIOS[sys.argv[1]](*sys.argv[2:])
    print("good")
