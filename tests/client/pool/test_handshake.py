"""What is settled at connect: which model, which version, and whether its tables fit what this side hashes."""

import asyncio
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest

from engrampool_client import (
    AsyncClient,
    Client,
    EngrampoolError,
    FingerprintError,
    ProtocolError,
    SpecError,
    UnavailableError,
    UnknownModelError,
    UnknownVersionError,
)
from engrampool_proto.v1 import pool_pb2
from engrampool_server.files.table_files import PackedModel
from server_fixtures import serve_thread
from small_model import CONFIG, TOKENIZER, small_spec


def connect(target: str, **settings) -> Client:
    """Connect both clients; they must agree on the outcome. (One alone if a tokenizer is read: that is slow.)"""
    if "tokenizer" in settings:
        return Client(target, **settings)

    async def probe() -> EngrampoolError | None:
        try:
            async with await AsyncClient.connect(target, **settings):
                return None
        except EngrampoolError as error:
            return error

    from_async = asyncio.run(probe())
    if from_async is not None:
        with pytest.raises(type(from_async)) as caught:
            Client(target, **settings)
        raise caught.value
    return Client(target, **settings)


def write_config(tmp_path, **changes):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({key: value for key, value in {**CONFIG, **changes}.items() if value is not None}))
    return path


def test_the_same_config_and_tokenizer_are_accepted(server, config):
    with connect(server, config=config, tokenizer=TOKENIZER) as client:
        assert client.lookup([1])[1].shape == (1, 24, 264)


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        # Together where they can be told apart: reading the tokenizer takes a second each time.
        (
            {"engram_vocab_size": 1010, "engram_head_dim": 128, "engram_pad_token_id": 3},
            {f"layer_{n}.{name}" for n in (1, 14) for name in ("head_sizes", "num_rows", "row_format", "hash.fill")},
        ),
        ({"engram_layer_ids": [1, 13]}, {"layers", "layer_13.hash.multipliers", "layer_14.hash.multipliers"}),
        ({"engram_max_ngram_size": 3}, {"layer_1.hash.multipliers", "layer_1.head_sizes"}),
    ],
)
def test_another_config_is_refused_field_by_field(server, tmp_path, changes, fields):
    with pytest.raises(FingerprintError) as caught:
        connect(server, config=write_config(tmp_path, **changes), tokenizer=TOKENIZER)
    named = {line.split(":")[0] for line in caught.value.differences}
    assert fields <= named
    assert "vocab_size" not in named
    assert all(line in str(caught.value) for line in caught.value.differences)


def test_the_asyncio_client_compares_too(server, tmp_path):
    config = write_config(tmp_path, engram_pad_token_id=3)
    with pytest.raises(FingerprintError, match=r"layer_1\.hash\.fill"):
        asyncio.run(AsyncClient.connect(server, config=config, tokenizer=TOKENIZER))


def test_another_tokenizer_is_refused(server, tmp_path):
    """One token that reads differently: two vocabularies of one size, which hash differently without a sign."""
    document = json.loads(TOKENIZER.read_text())
    vocab = document["model"]["vocab"]
    first, second = (token for token, number in vocab.items() if number in (5000, 6000))
    vocab[first], vocab[second] = vocab[second], vocab[first]
    document["model"]["merges"] = []
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(json.dumps(document))
    config = write_config(tmp_path)
    with pytest.raises(FingerprintError) as caught:
        connect(server, config=config, tokenizer=tokenizer)
    assert [line.split(":")[0] for line in caught.value.differences] == ["token_map.digest"]


def test_a_tokenizer_that_contradicts_the_config(server, tmp_path):
    config = write_config(tmp_path, engram_compressed_vocab_size=99091)
    with pytest.raises(SpecError, match="engram_compressed_vocab_size 99091, the tokenizer gives 99092"):
        connect(server, config=config, tokenizer=TOKENIZER)
    with pytest.raises(SpecError, match=r"tokenizer\.json is needed"):
        connect(server, config=config)
    with pytest.raises(SpecError, match="give both"):
        connect(server, tokenizer=TOKENIZER)


def test_choosing_among_models_and_versions(packed, other_packed):
    qwen = PackedModel.open(other_packed)
    qwen.close()
    with serve_thread(packed, other_packed) as server:
        with pytest.raises(UnknownModelError, match=r"name the model: the server holds deepseek-v4\.1, qwen-ple"):
            connect(server)
        with pytest.raises(UnknownModelError, match=r"no model 'gpt'; it holds deepseek-v4\.1, qwen-ple"):
            connect(server, model="gpt")
        with pytest.raises(UnknownVersionError, match=f"holds qwen-ple in {qwen.version}, not in {'0' * 32}"):
            connect(server, model="qwen-ple", version="0" * 32)
        with connect(server, model="qwen-ple", version=qwen.version) as client:
            assert client.version == qwen.version
            assert client.lookup([1, 7, 2])[3].shape == (3, 16, 80)


def test_nobody_there():
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # bound and never listening: connections are refused
        target = f"127.0.0.1:{reserved.getsockname()[1]}"
        with pytest.raises(UnavailableError, match=r"no server at .* was ready within 0\.5 s"):
            connect(target, connect_timeout_s=0.5)


@contextmanager
def answering(describe) -> Iterator[str]:
    """A real gRPC server whose Describe is `describe`."""
    handlers = {"Describe": grpc.unary_unary_rpc_method_handler(describe)} if describe else {}
    with ThreadPoolExecutor(1) as threads:
        server = grpc.server(threads)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("engrampool.v1.Pool", handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(None).wait()


def test_not_an_engrampool_server():
    with answering(None) as target, pytest.raises(ProtocolError, match="is no engrampool server"):
        connect(target)


def test_answers_that_contradict_themselves(spec):
    good = pool_pb2.Model(name=spec.name, version="1" * 32, spec_digest=spec.digest)
    good.spec_json = json.dumps(spec.to_json()).encode()
    wrong_digest, no_spec, damaged = (pool_pb2.Model.FromString(good.SerializeToString()) for _ in range(3))
    wrong_digest.spec_digest = "2" * 32
    no_spec.spec_json = b""
    damaged.spec_json = good.spec_json.replace(b'"fill": ', b'"fill": 1')
    for model, text in ((wrong_digest, "has digest"), (no_spec, "unreadable"), (damaged, "has digest")):
        answer = pool_pb2.DescribeResponse(models=[model]).SerializeToString()
        with (
            answering(lambda request, context, answer=answer: answer) as target,
            pytest.raises(ProtocolError, match=text),
        ):
            connect(target)
    with (
        answering(lambda request, context: b"\xff\xff") as target,
        pytest.raises(ProtocolError, match="something else"),
    ):
        connect(target)
    with answering(lambda request, context: b"") as target, pytest.raises(UnknownModelError, match="holds none"):
        connect(target)


def test_a_server_that_is_still_loading_is_waited_for(spec):
    """The first two answers are what a loading server says."""
    answers = []
    model = pool_pb2.Model(name=spec.name, version="1" * 32, spec_digest=spec.digest)
    model.spec_json = json.dumps(spec.to_json()).encode()
    for table in spec.tables:
        model.tables.add(layer=table.layer, row_start=0, row_stop=table.num_rows)

    def describe(request, context):
        answers.append(request)
        if len(answers) <= 2:
            context.set_trailing_metadata((("engrampool-reason", "loading"),))
            context.abort(grpc.StatusCode.UNAVAILABLE, "tables are still loading")
        return pool_pb2.DescribeResponse(models=[model]).SerializeToString()

    with answering(describe) as target, Client(target) as client:
        assert len(answers) == 3
        assert client.spec == small_spec()
