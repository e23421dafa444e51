"""Whatever way rows come by, it is asked, answers, is abandoned and given up alike; the fake one as the real ones."""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial

import numpy as np
import pytest

from engrampool_client import DeadlineError, PoolError, StepCancelledError
from engrampool_client.compute.served import ServedModel, choose
from engrampool_client.lanes.attach import AttachLane
from engrampool_client.lanes.grpc import GrpcLane
from engrampool_client.lanes.lane import Lane
from engrampool_client.lanes.native import NativeLane
from engrampool_client.lookup.delivery import Delivery
from engrampool_client.lookup.exchange import Exchange
from engrampool_client.testing import FakeLane
from engrampool_proto.synthetic import synthetic_rows
from exchanges import exchange_of
from server_fixtures import LIMIT_S, SPEC, expected, pack, running

pytestmark = pytest.mark.usefixtures("patient")
# Small answers and large ones come in different ways, over some lanes.
IDS = {"few": {9: [5, 0, 5], 2: [6499]}, "many": {2: np.arange(6500), 9: np.arange(4100)}}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[tuple[GrpcLane, ServedModel]]:
    model = pack(tmp_path_factory.mktemp("lanes") / "small")
    memory = tmp_path_factory.mktemp("memory")
    with running(model, memory=f"file:{memory}") as run:
        grpc_lane = GrpcLane(run.address)
        served = choose(grpc_lane.describe(LIMIT_S), None, None)
        yield grpc_lane, served
        grpc_lane.close()


@pytest.fixture(params=["grpc", "native", "attach", "fake"])
def lane(request, server) -> Iterator[Lane]:
    grpc_lane, served = server
    make: dict[str, Callable[[], Lane]] = {
        "grpc": lambda: GrpcLane(grpc_lane.target),
        "native": lambda: NativeLane(grpc_lane.open_direct, grpc_lane.target, 2),
        "attach": lambda: AttachLane(partial(grpc_lane.attach, "small", served.version), served),
        "fake": lambda: FakeLane(lambda layer, ids: synthetic_rows(SPEC.table(layer), ids.astype(np.uint64))),
    }
    made = make[request.param]()
    yield made
    made.close()


def fetch(lane: Lane, exchange: Exchange, timeout_s: float = LIMIT_S) -> bool:
    request = lane.ask(exchange, time.monotonic() + timeout_s)
    return request is not None and request.receive()


def right(exchange: Exchange, ids) -> bool:
    return all(exchange.delivery.rows[layer].tobytes() == expected(layer, ids[layer]) for layer in ids)


@pytest.mark.parametrize("ids", IDS.values(), ids=list(IDS))
@pytest.mark.parametrize("given", [False, True])
def test_rows_land_where_they_belong_a_layer_at_a_time(lane, server, ids, given):
    out = {n: np.zeros((len(one), SPEC.table(n).row_bytes), np.uint8) for n, one in ids.items()} if given else None
    told, exchange = [], exchange_of(server[1], ids, out)
    exchange.delivery.add_callback(told.append)
    assert fetch(lane, exchange)
    assert right(exchange, ids)
    assert told == [2, 9]
    assert exchange.times is not None
    if out is not None:
        assert all(exchange.delivery.rows[layer] is out[layer] for layer in out)


def test_layers_that_are_complete_are_not_asked_for_again(lane, server):
    exchange = exchange_of(server[1], IDS["few"])
    exchange.landing.destination(2, 0, 264)[:] = bytes(264)  # as if by another lane, of another time
    exchange.landing.received(2, 264)
    exchange.restart()
    assert fetch(lane, exchange)
    assert exchange.delivery.rows[2].tobytes() == bytes(264)
    assert exchange.delivery.rows[9].tobytes() == expected(9, IDS["few"][9])


def test_a_part_is_a_request_like_any_other(lane, server):
    exchange = exchange_of(server[1], IDS["many"])
    for part in exchange.split(3):
        assert not exchange.delivery.rows
        assert fetch(lane, part)
    assert right(exchange, IDS["many"])


def test_a_request_that_is_abandoned_leaves_the_lane_to_others(lane, server):
    request = lane.ask(exchange_of(server[1], IDS["few"]), time.monotonic() + LIMIT_S)
    if request is not None:
        request.abandon()
    end = time.monotonic() + LIMIT_S
    while not fetch(lane, again := exchange_of(server[1], IDS["few"])):  # a connection is opened meanwhile
        assert time.monotonic() < end
    assert right(again, IDS["few"])


def test_nothing_is_written_for_a_step_that_was_given_up(lane, server):
    out = {n: np.full((len(one), SPEC.table(n).row_bytes), 7, np.uint8) for n, one in IDS["many"].items()}
    exchange = exchange_of(server[1], IDS["many"], out)
    exchange.delivery.give_up(StepCancelledError("not wanted"))
    with pytest.raises((PoolError, StepCancelledError)):
        assert fetch(lane, exchange)
    assert all((array == 7).all() for array in out.values())
    assert not exchange.delivery.rows


def test_what_was_not_sent_in_time_is_a_deadline_or_for_another_lane(lane, server):
    exchange = exchange_of(server[1], IDS["few"])
    if isinstance(lane, GrpcLane):
        with pytest.raises(DeadlineError):
            fetch(lane, exchange, -1.0)
    elif isinstance(lane, NativeLane):
        assert lane.ask(exchange, time.monotonic() - 1) is None
    else:  # nothing to wait for
        assert fetch(lane, exchange, -1.0)


def test_a_lane_that_is_closed_brings_nothing(lane, server):
    lane.close()
    exchange = exchange_of(server[1], IDS["few"])
    with suppress(PoolError, ValueError):  # gRPC has its own ways to say that a channel is closed
        assert not fetch(lane, exchange)
    assert not exchange.delivery.rows


def test_the_fake_fails_as_it_is_told(server):
    lane = FakeLane(lambda layer, ids: np.zeros((len(ids), SPEC.table(layer).row_bytes), np.uint8))
    lane.error = DeadlineError("late")
    with pytest.raises(DeadlineError, match="late"):
        fetch(lane, exchange_of(server[1], IDS["few"]))
    lane.error, lane.free = None, False
    assert not fetch(lane, exchange_of(server[1], IDS["few"]))
    lane.free = True
    assert fetch(lane, exchange := exchange_of(server[1], IDS["few"], delivery=Delivery([2, 9])))
    assert not exchange.delivery.rows[2].any()
    assert len(lane.asked) == 2
