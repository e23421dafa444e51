"""The lane over gRPC: calls that Ctrl-C comes into."""

import gc
from math import inf

import numpy as np
import pytest

from engrampool_client.compute.served import ServedModel
from engrampool_client.lanes.grpc import GrpcLane
from exchanges import exchange_of
from server_fixtures import SPEC

SERVED = ServedModel(SPEC, "a version", max_rows=10**6, max_answer_bytes=10**9, server_version="", attach=False)


class Interrupted:
    """A call in which Ctrl-C comes. Freed, it takes a lock once more that may be taken for ever."""

    freed = 0

    def __iter__(self) -> "Interrupted":
        return self

    def __next__(self) -> bytes:
        raise KeyboardInterrupt

    def cancel(self) -> None:
        raise KeyboardInterrupt

    def __del__(self) -> None:
        Interrupted.freed += 1


@pytest.fixture
def lane(monkeypatch):
    monkeypatch.setattr(Interrupted, "freed", 0)
    lane = GrpcLane("127.0.0.1:1")
    connection = lane.enter()
    lane.leave(connection)
    connection.lookup_stream = lambda *_, **__: Interrupted()
    yield lane
    lane.close()


def test_a_call_that_ctrl_c_came_into_is_never_freed_and_its_connection_not_used_any_more(lane):
    before = lane.enter()
    lane.leave(before)
    request = lane.ask(exchange_of(SERVED, {2: np.zeros(50_000, np.int64)}), inf)
    with pytest.raises(KeyboardInterrupt):
        request.receive()
    del request
    after = lane.enter()
    lane.leave(after)
    assert after is not before
    del before, after
    lane.close()
    gc.collect()
    assert Interrupted.freed == 0


def test_nor_is_one_whose_cancelling_it_came_into(lane):
    connection, call = lane.enter(), Interrupted()
    with pytest.raises(KeyboardInterrupt):
        connection.cancel(call)
    assert connection.lost
    lane.leave(connection)
    del connection, call
    lane.close()
    gc.collect()
    assert Interrupted.freed == 0
