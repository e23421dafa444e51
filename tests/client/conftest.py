"""Small packed models and a real server, shared by the client's tests."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from engrampool_client.config import ClientConfig
from engrampool_client.lanes.grpc import _OPTIONS
from engrampool_proto.builders import blueprint
from engrampool_proto.spec import ModelSpec
from server_fixtures import LIMIT_S, serve_thread
from small_model import CONFIG, small_spec, write_model


@pytest.fixture(scope="module", autouse=True)
def time_enough() -> Iterator[None]:
    """For lookups, and for connecting, where a test names no time: no machine stands still for so long."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("timeout_s", "connect_timeout_s"):
            patch.setitem(ClientConfig.__init__.__kwdefaults__, name, 2 * LIMIT_S)
        yield


@pytest.fixture(scope="module")
def patient() -> Iterator[None]:
    """Where lanes are looked at, or lookups on them counted: none is left as this machine stood still for a moment."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("dial", "connection", "native"):
            patch.setattr(f"engrampool_client.lanes.{module}.OPEN_TIMEOUT_S", 2 * LIMIT_S)
        patch.setattr("engrampool_client.lanes.connection._SILENCE_S", 2 * LIMIT_S)
        patch.setattr("engrampool_client.lanes.attach._ASK_TIMEOUT_S", 2 * LIMIT_S)
        patch.setattr("engrampool_client.pool.endpoint._PROBE_TIMEOUT_S", 2 * LIMIT_S)
        far = dict.fromkeys(
            ("grpc.keepalive_time_ms", "grpc.keepalive_timeout_ms", "grpc.http2.ping_timeout_ms"), 120_000
        )
        patch.setattr("engrampool_client.lanes.grpc._OPTIONS", tuple({**dict(_OPTIONS), **far}.items()))
        yield


@pytest.fixture
def all_are_there(monkeypatch) -> None:
    """For clients whose servers all run: each of them is known once the client is made, however slowly they answer."""
    monkeypatch.setattr("engrampool_client.pool.shards._GRACE_S", LIMIT_S)


@pytest.fixture(scope="session")
def spec() -> ModelSpec:
    return small_spec()


@pytest.fixture(scope="session")
def config(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


@pytest.fixture(scope="session")
def packed(tmp_path_factory, spec) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "small", spec)


@pytest.fixture(scope="session")
def other_packed(tmp_path_factory) -> Path:
    """Another family, without a token map: Qwen's."""
    qwen = {
        "ple_layer_ids": [3],
        "ngram_vocab_size_base": 500,
        "ple_embed_dim": 640,
        "vocab_size": 1000,
        "eos_token_id": 7,
    }
    return write_model(tmp_path_factory.mktemp("models") / "qwen", blueprint(qwen).spec)


@pytest.fixture(scope="session")
def server(packed) -> Iterator[str]:
    with serve_thread(packed) as address:
        yield address
