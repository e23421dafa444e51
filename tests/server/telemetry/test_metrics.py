"""What a scrape of a real server says after known calls, to the last row."""

from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from engrampool_proto.hashing import TokenBatch
from engrampool_proto.v1 import pool_pb2
from server_fixtures import LIMIT_S, SPEC, GatherGate, RawPool, Running, eventually, pack, refusal, running, version_of


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("metrics") / "small")


def calls(run: Running, name: str = "handled") -> dict[tuple[str, ...], float]:
    """(method, code) or (method,) -> calls, as grpc_server_<name>_total has them, those that are not 0."""
    found = {}
    for key, value in run.scrape().items():
        if key.startswith(f"grpc_server_{name}_total{{") and value:
            labels = dict(part.split("=") for part in key[key.index("{") + 1 : -1].split(","))
            code = (labels["grpc_code"].strip('"'),) if "grpc_code" in labels else ()
            found[(labels["grpc_method"].strip('"'), *code)] = value
    return found


def ours(run: Running, prefix: str) -> dict[str, float]:
    return {key: value for key, value in run.scrape().items() if key.startswith(prefix) and value}


def method(name: str, kind: str) -> str:
    return f'{{grpc_method="{name}",grpc_service="engrampool.v1.Pool",grpc_type="{kind}"}}'


def test_rows_bytes_and_calls_are_counted_exactly(packed):
    with running(packed, metrics="127.0.0.1:0") as run, RawPool(run.address, version_of(packed)) as pool:
        pool.lookup(pool.by_ids((2, [1, 2, 2]), (9, [3])))
        pool.lookup(pool.by_ids((9, [])))
        list(pool.stream(pool.by_ids((2, np.zeros(7000, np.int64)))))  # 1.8 MB: two messages
        pool.lookup(pool.by_tokens(TokenBatch.of(np.array([1, 2], np.int32))))
        assert refusal(lambda: pool.lookup(pool.by_ids((2, [6500]))))[1] == "bad-batch"
        assert refusal(lambda: pool.lookup(pool.by_ids((4, [1]))))[1] == "unknown-layer"
        assert refusal(lambda: pool.stream(b"\xff"))[1] == "malformed-message"
        assert refusal(lambda: pool.stream(pool.by_ids((4, [1]))))[1] == "unknown-layer"
        describe = pool.channel.unary_unary("/engrampool.v1.Pool/Describe")
        describe(b"")
        assert refusal(lambda: describe(pool_pb2.DescribeRequest(model="x").SerializeToString()))[1] == "unknown-model"

        handled = {
            ("Lookup", "OK"): 3,
            ("Lookup", "INVALID_ARGUMENT"): 2,
            ("LookupStream", "OK"): 1,
            ("LookupStream", "INVALID_ARGUMENT"): 2,
            ("Describe", "OK"): 1,
            ("Describe", "NOT_FOUND"): 1,
        }
        eventually(lambda: sum(calls(run).values()) == 10, "ten calls ended")
        assert calls(run) == handled
        assert calls(run, "started") == {("Lookup",): 5, ("LookupStream",): 3, ("Describe",): 2}
        assert calls(run, "msg_received") == {("Lookup",): 5, ("LookupStream",): 3, ("Describe",): 2}
        assert calls(run, "msg_sent") == {("Lookup",): 3, ("LookupStream",): 2, ("Describe",): 1}

        # Six heads of layer 2 and two of layer 9 for each of two tokens.
        rows = {"2": 3 + 7000 + 12, "9": 1 + 4}
        # Each is counted, its bytes last, and what it held given back, by what is told of its end in turn.
        nbytes = sum(count * SPEC.table(int(layer)).row_bytes for layer, count in rows.items())
        eventually(lambda: sum(ours(run, "engrampool_lookup_bytes_total").values()) == nbytes, "all bytes")
        eventually(lambda: run.scrape()["engrampool_in_flight_bytes"] == 0, "nothing in flight")
        assert ours(run, "engrampool_lookup_rows_total") == {
            f'engrampool_lookup_rows_total{{layer="{layer}",model="small"}}': count for layer, count in rows.items()
        }
        assert ours(run, "engrampool_lookup_bytes_total") == {
            f'engrampool_lookup_bytes_total{{layer="{layer}",model="small"}}': count * SPEC.table(int(layer)).row_bytes
            for layer, count in rows.items()
        }
        assert ours(run, "engrampool_refused_total") == {
            'engrampool_refused_total{reason="bad-batch"}': 1,
            'engrampool_refused_total{reason="unknown-layer"}': 2,
            'engrampool_refused_total{reason="malformed-message"}': 1,
            'engrampool_refused_total{reason="unknown-model"}': 1,
        }
        seen = run.scrape()
        assert seen["engrampool_in_flight_bytes"] == 0
        for name in ("lookup", "lookup_queue", "lookup_gather"):
            assert seen[f'engrampool_{name}_seconds_count{{method="Lookup",model="small"}}'] == 3
            assert seen[f'engrampool_{name}_seconds_count{{method="LookupStream",model="small"}}'] == 1
        assert seen['engrampool_lookup_seconds_sum{method="Lookup",model="small"}'] > 0
        assert (
            seen['engrampool_lookup_gather_seconds_sum{method="LookupStream",model="small"}']
            <= seen['engrampool_lookup_seconds_sum{method="LookupStream",model="small"}']
        )
        assert seen[f"grpc_server_handling_seconds_count{method('Lookup', 'unary')}"] == 5
        assert seen[f"grpc_server_handling_seconds_count{method('LookupStream', 'server_stream')}"] == 3
        buckets = [value for key, value in seen.items() if key.startswith("grpc_server_handling_seconds_bucket")]
        assert max(buckets) == 5
        assert not any("_created" in key for key in seen)


def test_a_call_that_is_held_up_shows_in_its_times(packed, monkeypatch):
    """The second call waits for the one gather thread: its wait is queue time, and the first one's is gather time."""
    gate = GatherGate(monkeypatch)
    with running(packed, gather_threads=1) as run, RawPool(run.address, version_of(packed)) as pool:
        message = pool.by_ids((2, np.arange(2000)))
        first = pool.lookup.future(message)
        gate.wait_begun(1)
        second = pool.lookup.future(message)
        eventually(lambda: run.scrape()["engrampool_in_flight_bytes"] == 2 * 2000 * 264, "both are there")
        gate.open.set()
        first.result(LIMIT_S)
        second.result(LIMIT_S)
        count = 'engrampool_lookup_gather_seconds_count{method="Lookup",model="small"}'  # the last of its times
        eventually(lambda: run.scrape().get(count) == 2, "both are counted")
        eventually(lambda: run.scrape()["engrampool_in_flight_bytes"] == 0, "both are over")
        seen = run.scrape()
        total = seen['engrampool_lookup_seconds_sum{method="Lookup",model="small"}']
        parts = [
            seen[f'engrampool_lookup_{part}_seconds_sum{{method="Lookup",model="small"}}']
            for part in ("queue", "gather")
        ]
        assert all(0 < part <= total for part in parts)
        assert sum(parts) <= total + 1e-5  # each is rounded; what lies between the two has no name


def test_a_cancelled_unary_call_is_counted_as_cancelled(packed, monkeypatch):
    gate = GatherGate(monkeypatch)
    with running(packed) as run, RawPool(run.address, version_of(packed)) as pool:
        call = pool.lookup.future(pool.by_ids((2, np.arange(2000))))
        gate.wait_begun(1)
        call.cancel()
        eventually(lambda: calls(run), "a call ended")
        gate.open.set()
        assert calls(run) == {("Lookup", "CANCELLED"): 1}
        assert ours(run, "engrampool_lookup_rows_total") == {}


def test_an_unknown_method_is_unimplemented_and_breaks_nothing(packed):
    with running(packed) as run, RawPool(run.address, version_of(packed)) as pool:
        for path in ("/engrampool.v1.Pool/Delete", "/other.Service/Call", "/"):
            code, _, _ = refusal(lambda path=path: pool.channel.unary_unary(path)(b""))
            assert code == grpc.StatusCode.UNIMPLEMENTED
        pool.lookup(pool.by_ids((2, [1])))
        eventually(lambda: calls(run) == {("Lookup", "OK"): 1}, "the lookup is counted, and nothing else")


def test_health_watches_are_counted_when_they_end(packed):
    with running(packed) as run, grpc.insecure_channel(run.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
        watch = health.Watch(health_pb2.HealthCheckRequest(service="engrampool.v1.Pool"))
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        eventually(lambda: calls(run) == {("Check", "OK"): 1}, "the check is counted")
        assert calls(run, "started") == {("Check",): 1, ("Watch",): 1}
        watch.cancel()
        eventually(lambda: calls(run) == {("Check", "OK"): 1, ("Watch", "CANCELLED"): 1}, "the watch is counted")


def test_two_servers_of_one_process_count_apart(packed):
    with running(packed) as one, running(packed) as other:
        with RawPool(one.address, version_of(packed)) as pool:
            pool.lookup(pool.by_ids((2, [1, 2])))
        key = 'engrampool_lookup_rows_total{layer="2",model="small"}'
        eventually(lambda: one.scrape().get(key) == 2, "the lookup is counted")
        assert key not in other.scrape()
        assert calls(other) == {}


def test_what_is_held_and_its_limits_are_stated(packed, tmp_path):
    changed = pack(tmp_path / "changed", change=True)
    limits = {"max_answer_bytes": 1 << 20, "max_in_flight_bytes": 3 << 20}
    with running(packed, changed, load=False, **limits) as run:
        seen = run.scrape()
        assert seen["engrampool_to_load_bytes"] == 2 * SPEC.nbytes
        assert seen["engrampool_loaded_bytes_total"] == 0
        run.load()
        seen = run.scrape()
        assert seen["engrampool_loaded_bytes_total"] == 2 * SPEC.nbytes
        assert seen["engrampool_in_flight_limit_bytes"] == 3 << 20
        for table in SPEC.tables:  # both versions
            labels = f'{{layer="{table.layer}",model="small"}}'
            assert seen[f"engrampool_table_bytes{labels}"] == 2 * table.nbytes
            assert seen[f"engrampool_table_rows{labels}"] == 2 * table.num_rows
        assert seen['engrampool_load_seconds{model="small"}'] > 0
        info = ours(run, "engrampool_model_info")
        versions = {version_of(packed), version_of(changed)}
        assert info == {
            f'engrampool_model_info{{model="small",spec_digest="{SPEC.digest}",version="{version}"}}': 1
            for version in versions
        }
        assert len(ours(run, "engrampool_build_info")) == 1
        assert seen["process_resident_memory_bytes"] > 0
