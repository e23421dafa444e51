"""A small lookup over several shards, received as one: whatever comes of its parts, in whatever order and pieces."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engrampool_client import Client, DeadlineError
from engrampool_client.errors import EngrampoolError
from engrampool_client.lookup.exchange import Route
from engrampool_client.lookup.sent import Came
from engrampool_client.lookup.small import Small
from engrampool_client.pool.raced import Raced
from engrampool_client.pool.spread import Spread
from engrampool_client.pool.together import Together
from engrampool_client.testing import serve_process
from engrampool_proto import frames
from engrampool_proto.hashing import Identity
from engrampool_proto.spec import ModelSpec, RowFormat, Segment, TableSpec
from engrampool_proto.wire import ServerTimes
from forks import FEW, expected
from server_fixtures import eventually

pytestmark = pytest.mark.usefixtures("patient")
ALL_LAYERS = (2, 9, 11)
ROWS = RowFormat((Segment("values", "uint8", 3),))
SPEC = ModelSpec("m", 60, tuple(TableSpec(layer, 60, ROWS, Identity(60)) for layer in ALL_LAYERS))


class Part:
    """One that brings its layers in order, each after so many looks, and then the end."""

    small = False

    def __init__(self, layers: Sequence[int], looks: Sequence[int], number: int) -> None:
        self.layers, self._looks, self._number = layers, list(looks), number
        self.given: list[int] = []
        self.times: ServerTimes | None = None
        self.said: list[object] = []
        self.waited = 0

    def whole(self, layer: int) -> bool:
        return self.layers.index(layer) < len(self.given)

    def ready(self, until: float, spin_s: float) -> Came | None:
        return None

    def take(self, until: float, spin_s: float) -> int | Came:
        assert self.times is None  # nobody asks one that has ended
        at = len(self.given)
        if self._looks[at]:
            self._looks[at] -= 1
            self.waited += until > 0
            return Came.LATER
        if at == len(self.layers):
            self.times = ServerTimes(self._number, 0, 10 - self._number)
            return Came.ALL
        self.given.append(at)
        return at

    def shut(self) -> None:
        self.said.append("shut")

    def let_go(self, error: BaseException | None) -> None:
        self.said.append(error)

    def late(self, error: DeadlineError) -> None:
        self.said.append(error)

    def pass_over(self, until: float, error: EngrampoolError) -> None:
        self.said.append((until, error))


@st.composite
def parts(draw: st.DrawFn) -> list[Part]:
    made = []
    for number in range(draw(st.integers(1, 4))):
        layers = sorted(draw(st.sets(st.sampled_from(ALL_LAYERS), min_size=1)))
        looks = draw(st.lists(st.integers(0, 3), min_size=len(layers) + 1, max_size=len(layers) + 1))
        made.append(Part(layers, looks, number))
    return made


@given(parts())
def test_each_layer_is_whole_once_all_parts_have_it_and_none_waits_for_a_later_one(made):
    layers = sorted({layer for part in made for layer in part.layers})
    together, given_layers = Together(layers, [(part, part.layers) for part in made]), []
    for _ in range(200):
        before = [part.waited for part in made]
        came = together.take(1.0, 0.0)
        # All of the time that there is goes to the first that has not come.
        assert sum(part.waited for part in made) - sum(before) == (came is Came.LATER)
        if isinstance(came, int):
            layer = layers[came]
            given_layers.append(layer)
            assert all(part.whole(layer) for part in made if layer in part.layers)
            # Nobody was asked for what comes after it.
            assert all(one <= layer for part in made for one in part.layers[: len(part.given)])
        elif came is Came.ALL:
            break
    assert given_layers == layers
    assert came is Came.ALL
    assert together.times == ServerTimes(len(made) - 1, 0, 10)


def test_one_that_comes_to_nothing_is_the_end_of_all():
    class Broken(Part):
        def take(self, until: float, spin_s: float) -> int | Came:
            return Came.NOTHING

    good, broken = Part((2, 9), (0, 0, 0), 1), Broken((2, 9), (0, 0, 0), 2)
    together = Together((2, 9), [(good, good.layers), (broken, broken.layers)])
    assert together.take(1.0, 0.0) is Came.NOTHING
    together.shut()
    together.let_go(None)
    late = DeadlineError("it is late")
    together.late(late)
    together.pass_over(3.0, late)
    assert good.said == broken.said == ["shut", None, late, (3.0, late)]


@given(st.data(), st.integers(1, 4))
def test_ids_and_places_of_each_shard_are_those_of_its_rows(data, shards):
    routes = {}
    for layer in ALL_LAYERS:
        starts = [0, *sorted(data.draw(st.sets(st.integers(1, 59), max_size=4)))]
        holders = data.draw(st.lists(st.integers(0, shards - 1), min_size=len(starts), max_size=len(starts)))
        routes[layer] = Route(np.array(starts, np.uint64), np.array(holders, np.int64))
    layers = sorted(data.draw(st.sets(st.sampled_from(ALL_LAYERS), min_size=1)))
    asked = {
        layer: np.array(data.draw(st.lists(st.integers(0, 59), min_size=1, max_size=9)), np.uint32) for layer in layers
    }
    ids = b"".join(rows.tobytes().ljust(frames.padded(rows.nbytes), b"\0") for rows in asked.values())
    rows = {layer: np.empty((len(wanted), 3), np.uint8) for layer, wanted in asked.items()}
    counts = np.array([len(one) for one in asked.values()])
    whole = Small(("m", "v", tuple(layers)), counts, np.frombuffer(bytearray(ids), np.uint8), rows, (), 0)
    cut = Spread(SPEC, routes, shards).of(whole)
    seen = {layer: np.zeros(len(wanted), int) for layer, wanted in asked.items()}
    for shard, part in cut.items():
        at = 0
        assert list(part.rows) == list(part.what[2])
        assert part.nbytes == 3 * sum(part.counts)
        for layer, count in zip(part.what[2], part.counts, strict=True):
            theirs = np.frombuffer(part.ids, np.uint32, count, at)
            at += frames.padded(4 * count)
            places = part.places.get(layer, np.arange(count))
            assert part.rows[layer] is rows[layer]
            assert count == len(places) > 0
            assert theirs.tolist() == asked[layer][places].tolist()
            owner = routes[layer].shards[np.searchsorted(routes[layer].starts, theirs, side="right") - 1]
            assert (owner == shard).all()
            seen[layer][places] += 1
        assert at == len(part.ids)
    assert all((times == 1).all() for times in seen.values())


def test_a_step_whose_server_dies_is_answered_by_another(packed):
    with serve_process(packed, workers=1) as one, serve_process(packed, workers=1) as other:
        servers = {server.address: server for server in (one, other)}
        with Client(list(servers), attach="off") as client:
            wanted = expected(client.spec, FEW)
            eventually(lambda: client._shards.sends, "small steps are sent")
            with one.frozen(), other.frozen():
                step = client.prefetch(FEW, timeout_s=60.0)
                request = step.delivery.receiver._request
                assert isinstance(request, Raced)
                servers[request._endpoint.target].process.kill()
            assert all(np.array_equal(step.rows(layer), wanted[layer]) for layer in (1, 14))
            eventually(lambda: client.stats.in_flight == 0, "all is given back")
            again = client.prefetch(FEW)
            assert all(np.array_equal(again.rows(layer), wanted[layer]) for layer in (1, 14))
