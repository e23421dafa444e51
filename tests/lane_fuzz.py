"""Random and mutated frames into the server's side of the direct lane: python tests/lane_fuzz.py --frames 1000000.

Each connection is one end of a pair of sockets, with the thread of a real `Connection` at the other. Whatever it is
sent, it may answer with rows of its tables, with refusals, or not at all: any other byte is a failure, and so is a
lookup afterwards, on another connection, that is not answered as it should be.
"""

import argparse
import contextlib
import random
import socket
import threading
from collections import Counter
from itertools import pairwise

import numpy as np

from direct_callers import lookup_frame
from engrampool_proto import frames, wire
from engrampool_proto.synthetic import synthetic_rows
from engrampool_server.answer.in_flight import InFlight
from engrampool_server.answer.lane.connection import Connection
from engrampool_server.answer.lane.resources import Resources
from engrampool_server.answer.lookups import Limits, Lookups
from engrampool_server.memory.tables import LoadedModel, LoadedTable
from engrampool_server.telemetry.metrics import Metrics
from server_fixtures import LIMIT_S, SPEC, expected

MIB = 1 << 20
NAMED = {2: 264, 9: 42}  # layers, and bytes of their rows
HEADER = frames.HEADER


class Target:
    """The server's side, without a server."""

    def __init__(self) -> None:
        every = {table.layer: np.arange(table.num_rows) for table in SPEC.tables}
        tables = {table.layer: LoadedTable(table, synthetic_rows(table, every[table.layer])) for table in SPEC.tables}
        model = self.model = LoadedModel(SPEC, "a version", tables)
        metrics = Metrics()
        self.lookups = Lookups(Limits(20_000, 8 * MIB, MIB), InFlight(64 * MIB), metrics, 0)
        self.lookups.add(model)
        self.lookups.ready = True
        self.resources = Resources(self.lookups, metrics, 2 * MIB)
        self.rows = {
            layer: {table.rows[at].tobytes() for at in range(len(table.rows))} for layer, table in model.tables.items()
        }
        self.ended = Counter[str]()

    def close(self) -> None:
        self.lookups.close()

    def say(self, *sent: bytes) -> bytes:
        """Everything that comes back for these bytes, after a hello, until the connection has ended.

        sent: each is given to the system by itself.
        """
        ours, theirs = socket.socketpair()
        left = threading.Event()
        connection = Connection(self.resources, theirs, "fuzz", lambda *_: True, lambda _: left.set())
        connection.start()
        answer = bytearray()
        with ours:
            ours.settimeout(LIMIT_S)

            def send() -> None:
                with contextlib.suppress(OSError):
                    ours.sendall(frames.frame(frames.HELLO, b"ticket"))
                    for part in sent:
                        ours.sendall(part)
                    ours.shutdown(socket.SHUT_WR)

            sending = threading.Thread(target=send)
            sending.start()
            with contextlib.suppress(ConnectionResetError):
                while got := ours.recv(MIB):
                    answer += got
            sending.join()
        assert left.wait(LIMIT_S), "the thread has not ended"
        assert self.lookups.in_flight.total == 0
        return bytes(answer)

    def check(self, answer: bytes) -> None:
        """Fail for anything but frames of rows that are there, ends, and refusals."""
        at = 0
        while at + HEADER.size <= len(answer):
            kind, layer, _, _, nbytes = HEADER.unpack_from(answer, at)
            at += HEADER.size
            body = answer[at : at + nbytes]
            at += nbytes
            if kind == frames.ROWS:
                width = NAMED[layer]
                for start in range(0, len(body) - width + 1, width):
                    assert body[start : start + width] in self.rows[layer], "these bytes are no row"
            else:
                assert kind in (frames.READY, frames.END, frames.REFUSED)
                assert nbytes <= frames.MAX_SMALL_BYTES
            self.ended[{frames.ROWS: "rows", frames.END: "answers", frames.REFUSED: "refusals"}.get(kind, "ready")] += 1


HANDLES = ([2], [9], [2, 9])


def frames_of(target: Target, draw: random.Random, count: int) -> bytes:
    """Some frames: good ones, and ones of which bytes were changed, left out, doubled, or made up."""
    version, parts = target.model.version, []
    for handle, layers in enumerate(HANDLES):
        parts.append(frames.register(handle, "small", version, layers))
    for number in range(count):
        most = 4100 if draw.random() < 0.95 else 2**32
        ids = {
            layer: np.array([draw.randrange(most) for _ in range(draw.choice([0, 1, 3, 40]))], np.uint32)
            for layer in NAMED
        }
        if draw.random() < 0.02:  # such that what comes has no room where small requests do
            ids = {layer: np.tile(some, 20_000 // max(1, some.size)) for layer, some in ids.items()}
        handle = draw.randrange(len(HANDLES))
        frame = bytearray(lookup_frame(handle, number, *(ids[layer] for layer in HANDLES[handle])))
        if draw.random() < 0.1:
            request = wire.encode_request(wire.LookupRequest("small", version, tuple(ids.items())))
            frame = bytearray(frames.request_start(number, 0, len(request)) + request)
        elif draw.random() < 0.05:
            frame = bytearray(frames.register(draw.randrange(70), "small", version, draw.choice(HANDLES)))
        while draw.random() < 0.1 and frame:
            change(frame, draw)
        parts.append(bytes(frame))
    return b"".join(parts)


def change(frame: bytearray, draw: random.Random) -> None:
    """Damage a frame, most often its header."""
    at = draw.randrange(min(len(frame), draw.choice([HEADER.size, HEADER.size + 8, len(frame)])))
    how = draw.randrange(5)
    if how == 0:
        frame[at] ^= 1 << draw.randrange(8)
    elif how == 1:
        frame[at : at + 8] = draw.choice([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]).to_bytes(8, "little")
    elif how == 2:
        del frame[at : at + draw.randrange(1, 9)]
    elif how == 3:
        frame[at:at] = draw.randbytes(draw.randrange(1, 9))
    else:
        frame[at:at] = frame[: draw.randrange(len(frame))]


def torn(sent: bytes, draw: random.Random) -> list[bytes]:
    """The same in some parts, which begin wherever."""
    cuts = sorted(draw.randrange(len(sent)) for _ in range(draw.choice([0, 0, 2, 20])))
    return [sent[start:stop] for start, stop in pairwise([0, *cuts, len(sent)])]


def fuzz(target: Target, seed: int, count: int) -> Counter[str]:
    """Send so many frames; gives how often what came back. A failure names its seed."""
    sent = 0
    while sent < count:
        draw = random.Random(seed)
        some = draw.choice([1, 3, 10, 100])
        try:
            target.check(target.say(*torn(frames_of(target, draw, some), draw)))
        except BaseException as error:
            raise AssertionError(f"seed {seed}") from error
        sent, seed = sent + some, seed + 1
        if seed % 200 == 0:
            good = target.say(
                frames.register(1, "small", target.model.version, [2]) + lookup_frame(1, 7, np.array([3, 4], np.uint32))
            )
            assert good[HEADER.size :].startswith(frames.rows_start(7, 2, 0, 528) + expected(2, [3, 4]))
    return target.ended


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    target = Target()
    print(given.frames, "frames from seed", given.seed, dict(fuzz(target, given.seed, given.frames)))
    target.close()


if __name__ == "__main__":
    main()
