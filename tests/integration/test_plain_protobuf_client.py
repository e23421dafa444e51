"""The contract from outside: a client generated from pool.proto alone gets the bytes that ours gets."""

import base64
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import engrampool_proto
from engrampool_client.testing import serve_process
from engrampool_proto.hashing import TokenBatch
from engrampool_proto.spec import ModelSpec
from server_fixtures import SPEC, expected, pack, version_of

PROTO = Path(engrampool_proto.__file__).parent / "v1" / "pool.proto"
WIDE, NARROW = [6499, 0, 17, 17], list(range(4100)) * 8  # 1.4 MB of layer 9: two messages
TOKENS = TokenBatch(
    np.array([5, 7, 999, 2, 0], np.int32),
    np.array([0, 2, 2, 5], np.int32),
    np.array([[1, 2], [3, -1], [-1, -1]], np.int32),
    np.array([0, 0, 1, 0, 0], np.bool_),
    np.array([[0, 1], [0, 0], [0, 0]], np.bool_),
)


def base64_of(values, dtype: str) -> str:
    return base64.b64encode(np.asarray(values).astype(dtype).tobytes()).decode()


def calls() -> list[dict]:
    """LookupRequests in protobuf's JSON form."""
    tokens = {
        "tokens": base64_of(TOKENS.tokens, "<i4"),
        "query_start_loc": base64_of(TOKENS.query_start_loc, "<i4"),
        "lookback": base64_of(TOKENS.lookback, "<i4"),
        "lookback_width": 2,
        "dead": base64_of(TOKENS.dead, "u1"),
        "lookback_dead": base64_of(TOKENS.lookback_dead, "u1"),
    }
    return [
        {"tables": [{"layer": 9, "u32": base64_of(NARROW, "<u4")}, {"layer": 2, "u64": base64_of(WIDE, "<u8")}]},
        {"tables": [{"layer": 2, "u32": ""}]},
        {"tokens": tokens},
        {"tokens": tokens, "layers": [9]},
    ]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("plain") / "small")


@pytest.fixture(scope="module")
def found(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What the plain client saw of a real server process."""
    directory = tmp_path_factory.mktemp("generated")
    shutil.copy(PROTO, directory)
    shutil.copy(Path(__file__).parent / "plain_client.py", directory)
    compile_it = ["-m", "grpc_tools.protoc", "-I.", "--python_out=.", "--grpc_python_out=.", "pool.proto"]
    subprocess.run([sys.executable, *compile_it], cwd=directory, check=True, timeout=300)
    with serve_process(packed) as server:
        job = {"target": server.address, "calls": calls()}
        done = subprocess.run(
            [sys.executable, "plain_client.py"],
            cwd=directory,
            input=json.dumps(job),
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_nothing_of_ours_was_imported(found):
    assert found["imported"] == []


def test_describe_states_everything(found, packed):
    [model] = found["describe"]["models"]
    assert (model["name"], model["version"], model["spec_digest"]) == ("small", version_of(packed), SPEC.digest)
    assert ModelSpec.from_json(json.loads(base64.b64decode(model["spec_json"]))) == SPEC
    for stated, table in zip(model["tables"], SPEC.tables, strict=True):
        segments = [{"name": s.name, "dtype": s.dtype, "length": s.length} for s in table.row_format.segments]
        assert stated == {
            "layer": table.layer,
            "num_rows": str(table.num_rows),
            "row_bytes": table.row_bytes,
            "heads": table.heads,
            "segments": segments,
            "row_stop": str(table.num_rows),
        }
    assert found["describe"]["server_version"] == engrampool_proto.__version__
    assert set(found["describe"]["limits"]) == {"max_rows_per_request", "max_answer_bytes", "max_in_flight_bytes"}


def test_lookups_give_the_synthetic_rows(found):
    hashed = SPEC.hash(TOKENS)
    wanted = [
        [(9, NARROW), (2, WIDE)],
        [(2, [])],
        [(2, hashed[2].reshape(-1)), (9, hashed[9].reshape(-1))],
        [(9, hashed[9].reshape(-1))],
    ]
    for answer, tables in zip(found["lookup"], wanted, strict=True):
        assert answer == [[layer, 0, expected(layer, ids).hex()] for layer, ids in tables]
    for runs, tables in zip(found["stream"], wanted, strict=True):
        assert [run[0] for run in runs] == sorted(run[0] for run in runs)
        for layer, ids in tables:
            mine = [run for run in runs if run[0] == layer]
            assert "".join(rows for _, _, rows in mine) == expected(layer, ids).hex()
            lengths = [len(rows) // 2 // SPEC.table(layer).row_bytes for _, _, rows in mine]
            assert [first for _, first, _ in mine] == [0, *np.cumsum(lengths)[:-1]]
    assert len(found["stream"][0]) == 3


def test_refusals_can_be_read_by_programs_and_people(found):
    code, metadata, text = found["refusal"]
    assert (code, metadata["engrampool-reason"]) == ("NOT_FOUND", "unknown-model")
    assert text == "no model 'none' here; held: small"


def test_health_can_be_checked_and_watched(found):
    serving, service_unknown = 1, 3
    assert found["health"] == {
        "": [serving, serving],
        "engrampool.v1.Pool": [serving, serving],
        "other": ["NOT_FOUND", service_unknown],
    }


def test_reflection_states_the_contract(found):
    assert {"engrampool.v1.Pool", "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"} == set(
        found["services"]
    )
    streams = {"Describe": False, "Lookup": False, "LookupStream": True, "OpenDirect": False, "Attach": False}
    streams |= {"Stats": False}
    assert found["methods"] == [[name, stream] for name, stream in streams.items()]
    assert found["same_contract"]
