"""Servers whose tables come from object stores: real processes, a real S3 endpoint."""

import json

import numpy as np
import pytest

from engrampool_client import Client
from engrampool_client.testing import ServerStartError, serve_process
from engrampool_proto.hashing import TokenBatch
from engrampool_proto.synthetic import synthetic_rows
from server_fixtures import PATIENCE
from small_model import small_spec, write_model
from stores import http_files, s3_server

TOKENS = np.arange(300, dtype=np.int32)


@pytest.fixture(scope="module")
def spec():
    return small_spec()


@pytest.fixture(scope="module")
def packed(tmp_path_factory, spec):
    return write_model(tmp_path_factory.mktemp("models") / "small", spec)


def assert_serves(server, spec) -> None:
    with Client(server.address, **PATIENCE) as client:
        rows = client.lookup(TOKENS)
    ids = spec.hash(TokenBatch.of(TOKENS))
    assert all(np.array_equal(rows[n], synthetic_rows(spec.table(n), ids[n])) for n in (1, 14))


def test_a_server_serves_a_bucket_and_says_nothing_secret(packed, spec):
    with s3_server() as s3:
        s3.upload(packed, "tables/v41")
        with serve_process("s3://tables/v41", environ=s3.environ, workers=2) as server:
            assert_serves(server, spec)
            lines = [server.wait_for(event) for event in ("starting", "opened", "loaded", "serving")]
        assert lines[0]["models"] == ["s3://tables/v41"]
        assert s3.environ["AWS_SECRET_ACCESS_KEY"] not in json.dumps(lines)
        with (
            s3.refusing(),
            pytest.raises(ServerStartError, match=r"v41/manifest.json cannot be read: 403 Forbidden") as error,
            serve_process("s3://tables/v41", environ=s3.environ),
        ):
            pass
        assert s3.environ["AWS_SECRET_ACCESS_KEY"] not in str(error.value)


def test_a_start_that_adopts_its_tables_asks_for_no_row(packed, spec, tmp_path):
    with http_files() as files:
        files.add(packed, "m")
        for start in range(2):
            files.asked.clear()
            with serve_process(f"{files.url}/m", memory=f"file:{tmp_path}") as server:
                assert_serves(server, spec)
            nbytes = sum(b - a for _, name, a, b in files.asked if a >= 4096 and name.endswith(".safetensors"))
            assert nbytes == (spec.nbytes if start == 0 else 0)
