"""Deduplication, cache, column ranges and separate segments never change a byte."""

import os
import tracemalloc
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engrampool_client import BatchError, CacheFileError, Client
from engrampool_client.lookup.plan import Layout
from engrampool_proto.builders import blueprint
from engrampool_proto.hashing import TokenBatch
from engrampool_proto.synthetic import synthetic_rows
from server_fixtures import columns_of, serve_thread
from small_model import write_model

SETTINGS = {
    "as it is": {"dedupe": False},
    "dedupe": {},
    "cache": {"cache_bytes": 4 << 20},
    "small cache": {"cache_bytes": 100_000},
    "tensor-parallel": {"heads": (6, 13), "cache_bytes": 1 << 20},
    "one column": {"heads": (23, 24)},
}


# Each is asked of six clients, with several batches.
FEWER = settings(max_examples=min(25, settings.default.max_examples))


@pytest.fixture(scope="module", params=SETTINGS.values(), ids=list(SETTINGS))
def client(request, server) -> Iterator[Client]:
    # Deduplicate however few there are.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engrampool_client.lookup.plan._DEDUPE_TOKENS", 1)
        with Client(server, **request.param) as client:
            yield client


def expected(client: Client, batch: TokenBatch) -> dict[int, np.ndarray]:
    """By the tables alone."""
    spec, heads = client.spec, columns_of(client)
    return {layer: synthetic_rows(spec.table(layer), ids[:, heads]) for layer, ids in spec.hash(batch).items()}


@st.composite
def batches(draw) -> TokenBatch:
    """Few different tokens, several requests, look-backs, dead spans."""
    lengths = draw(st.lists(st.integers(0, 40), min_size=1, max_size=4))
    total, width, few = sum(lengths), draw(st.integers(0, 3)), draw(st.integers(1, 30))
    random = np.random.default_rng(draw(st.integers(0, 1000)))
    bounds = np.cumsum([0, *lengths]).astype(np.int32)
    shape = (len(lengths), width)
    return TokenBatch(
        random.integers(0, few, total).astype(np.int32),
        bounds,
        random.integers(-1, few, shape).astype(np.int32),
        random.random(total) < 0.1,
        random.random(shape) < 0.1,
    )


def arrays(batch: TokenBatch) -> tuple:
    return batch.tokens, batch.query_start_loc, batch.lookback, batch.dead, batch.lookback_dead


def assert_same(found, wanted) -> None:
    assert list(found) == list(wanted)
    for layer, rows in wanted.items():
        assert found[layer].shape == rows.shape
        assert np.array_equal(found[layer], rows)


@FEWER
@given(st.lists(batches(), min_size=1, max_size=3))
def test_any_settings_give_the_bytes_of_the_table(client, some):
    for batch in some:
        wanted = expected(client, batch)
        assert_same(client.lookup(*arrays(batch)), wanted)
        step = client.prefetch(*arrays(batch))
        assert_same({layer: step.rows(layer) for layer in step.layers}, wanted)
        assert all(step.valid(layer).all() and len(step.valid(layer)) == batch.num_tokens for layer in step.layers)
        out = {layer: np.full(rows.shape, 7, np.uint8) for layer, rows in wanted.items()}
        assert_same(client.lookup(*arrays(batch), out=out), wanted)
        assert_same(out, wanted)


@FEWER
@given(batches(), st.booleans())
def test_rows_by_id_are_the_same_rows(client, batch, shaped):
    heads = columns_of(client)
    ids = {layer: rows[:, heads] for layer, rows in client.spec.hash(batch).items()}
    wanted = expected(client, batch)
    if shaped and batch.num_tokens % 2 == 0:
        ids = {layer: rows.reshape(2, -1, rows.shape[1]) for layer, rows in ids.items()}
        wanted = {layer: rows.reshape(2, -1, *rows.shape[1:]) for layer, rows in wanted.items()}
    assert_same(client.lookup_rows(ids), wanted)
    # Ids that no n-gram has are looked up all the same.
    mixed = {layer: rows[..., ::-1].astype(np.int64) for layer, rows in ids.items()}
    assert_same(client.lookup_rows(mixed), {layer: rows[..., ::-1, :] for layer, rows in wanted.items()})


@FEWER
@given(batches())
def test_segments_are_written_apart(client, batch):
    wanted = expected(client, batch)
    out = {}
    for layer, rows in wanted.items():
        sizes = {"values": 256, "scales": 8} if layer == 1 else {"scales": 8}
        out[layer] = {name: np.full((*rows.shape[:-1], size), 7, np.uint8) for name, size in sizes.items()}
    assert_same(client.lookup(*arrays(batch), out=out), wanted)
    assert np.array_equal(out[1]["values"], wanted[1][..., :256])
    for layer in wanted:
        assert np.array_equal(out[layer]["scales"], wanted[layer][..., 256:])


def test_segments_that_do_not_fit_are_refused(client):
    count = client.dummy(1).rows(1).shape[1]
    for out, text in (
        ({"value": np.empty((2, count, 256), np.uint8)}, "no segment 'value'"),
        ({"values": np.empty((2, count, 255), np.uint8)}, "out of values of layer 1 must be a uint8 array"),
        ({"values": [1]}, "it is list"),
    ):
        with pytest.raises(ValueError, match=text):
            client.lookup([1, 2], out={1: out})


def test_every_row_is_asked_for_once(server):
    with Client(server, cache_bytes=16 << 20) as client:
        tokens = np.array([3, 5] * 200, np.int32)
        client.lookup(tokens)
        # 3 orders: the n-grams at the start, and two that take turns afterwards.
        ngrams = (1 + 2) + (2 + 2) + (3 + 2)
        assert client.stats.bytes["wire"] == ngrams * 2 * 8 * 264
        total = len(tokens) * 48 * 264
        assert client.stats.bytes["duplicate"] == total - client.stats.bytes["wire"]
        client.lookup(tokens)
        assert client.stats.bytes["wire"] == ngrams * 2 * 8 * 264
        assert client.stats.bytes["cache"] == total


def test_a_small_lookup_without_a_cache_goes_as_it_is(server, monkeypatch):
    monkeypatch.setattr("engrampool_client.lookup.plan._DEDUPE_TOKENS", 101)
    with Client(server) as client:
        client.lookup(np.array([3] * 100, np.int32))
        assert client.stats.bytes["wire"] == 100 * 48 * 264
        client.lookup(np.array([3] * 1000, np.int32))
        assert client.stats.bytes["wire"] == (100 + 3) * 48 * 264  # of 1000 tokens, three n-grams an order


def test_lookups_of_many_lengths_leave_little_behind(server):
    tokens = np.full(20_000, 3, np.int32)
    with Client(server, cache_bytes=1 << 20, heads=(23, 24)) as client:
        client.lookup(tokens)
        tracemalloc.start()
        try:
            begin, _ = tracemalloc.get_traced_memory()
            for count in range(19_900, 19_950):
                client.lookup(tokens[:count])
            end, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert end - begin < 500_000  # a byte for each token would be two millions


def test_a_warm_file_serves_the_next_client(server, tmp_path):
    tokens = np.arange(300, dtype=np.int32)
    path = tmp_path / "warm"
    with Client(server, cache_bytes=64 << 20) as client:
        wanted = client.lookup(tokens)
        client.save_cache(path)
    with Client(server, warm=path) as client:
        assert_same(client.lookup(tokens), wanted)
        assert client.stats.bytes["wire"] == 0
        assert client.stats.bytes["warm"] == 300 * 48 * 264
        with pytest.raises(ValueError, match="no cache to save"):
            client.save_cache(path)
    with pytest.raises(CacheFileError, match="layout"), Client(server, warm=path, heads=(0, 8)):
        pass


@pytest.mark.parametrize("on_failure", ["raise", "mask"])
def test_rows_that_are_damaged_in_a_warm_file_come_from_the_server(server, tmp_path, on_failure, caplog):
    tokens, path = np.arange(64, dtype=np.int32), tmp_path / "warm"
    with Client(server, cache_bytes=8 << 20) as client:
        wanted = client.lookup(tokens)
        client.save_cache(path)
    # The last rows of the file are of entries that the tokens need, as all are; behind them are only their sums.
    behind = -8 * 64 * 6
    with path.open("r+b") as file:
        for entry in (1, 3):
            file.seek(behind - entry * 8 * 264 + 5, os.SEEK_END)
            file.write(b"\xff\x00\xff\x00")
    with Client(server, warm=path, on_failure=on_failure) as client:
        for number in (1, 2):
            assert_same(client.lookup(tokens), wanted)
            assert client.stats.bytes["wire"] == number * 2 * 8 * 264
    assert len([text for text in caplog.messages if "warm is damaged" in text]) == 1


@pytest.fixture(scope="module")
def other_models(tmp_path_factory) -> Iterator[dict[str, Client]]:
    """Clients of families where every column is a group."""
    configs = {
        "longcat": {
            "vocab_size": 50,
            "eos_token_id": 3,
            "hidden_size": 96,
            "ngram_vocab_size_ratio": 3,
            "emb_neighbor_num": 3,
            "emb_split_num": 2,
        },
        "gemma": {"vocab_size_per_layer_input": 60, "hidden_size_per_layer_input": 8, "num_hidden_layers": 3},
    }
    models = []
    for name, config in configs.items():
        models.append(write_model(Path(tmp_path_factory.mktemp("models")) / name, blueprint(config, name=name).spec))
    with ExitStack() as stack:
        address = stack.enter_context(serve_thread(*models))
        yield {name: stack.enter_context(Client(address, name, cache_bytes=1 << 20)) for name in configs}


@pytest.mark.parametrize("name", ["longcat", "gemma"])
@given(batch=batches())
def test_other_families(other_models, name, batch):
    client = other_models[name]
    batch = TokenBatch(batch.tokens, batch.query_start_loc, batch.lookback[:, : client.spec.lookback], batch.dead)
    for _ in range(2):
        assert_same(client.lookup(*arrays(batch)), expected(client, batch))
    assert_same(client.lookup_rows(client.spec.hash(batch)), expected(client, batch))


@pytest.mark.parametrize("heads", [(0, 0), (3, 2), (-1, 4), (0, 25)])
def test_columns_out_of_range_are_refused(server, heads):
    with pytest.raises(ValueError, match="heads must be"), Client(server, heads=heads):
        pass


def test_a_layout_of_part_columns_has_parts_of_one_width(spec):
    layout = Layout(spec, slice(6, 19))
    parts = layout.parts[1]
    assert [(part.first, part.stop, part.width, len(part.groups)) for part in parts] == [
        (0, 2, 2, 1),
        (2, 10, 8, 1),
        (10, 13, 3, 1),
    ]
    assert layout.groups == 6
    assert layout.entry_bytes == 8 * 264


def test_bad_ids_are_refused_whatever_the_settings(client):
    with pytest.raises(BatchError, match="row id -1 at position 0"):
        client.lookup_rows({1: np.full((1, client.dummy(1).rows(1).shape[1]), -1)})
    with pytest.raises(BatchError, match="is 129280"):
        client.prefetch([129280]).rows(1)
