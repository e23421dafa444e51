"""Caches that are simulated: as a client's own caches would do, in little memory."""

import threading

import numpy as np
import pytest

from engrampool_client import Client
from engrampool_client.compute.cache import HotRows
from engrampool_client.compute.layout import Layout
from engrampool_client.doctor import cache_sizes
from engrampool_client.doctor.cache_sizes import CacheSize, best_size, simulate
from engrampool_client.doctor.replay import Forward
from engrampool_proto.hashing import TokenBatch

VOCAB = 129280


def text_of(count, seed=0) -> np.ndarray:
    """Few words, so that n-grams come again."""
    return (np.random.default_rng(seed).zipf(1.7, count) % VOCAB).astype(np.int32)


def test_the_cache_tried_is_the_smallest_that_does_nearly_what_the_largest_does():
    sizes = [CacheSize(1 << at, 0.5, {"decode": share}, 1) for at, share in enumerate((0.1, 0.44, 0.46, 0.5))]
    assert best_size(sizes, "decode") == 1 << 2
    assert best_size(sizes, "prefill") is None
    assert best_size([CacheSize(1, 0.5, {"decode": 0.09}, 0)], "decode") is None
    assert best_size([], "decode") is None


@pytest.mark.parametrize("heads", [None, (3, 20)])
@pytest.mark.parametrize("source", ["tokens", "rows"])
def test_a_simulated_cache_does_what_one_in_a_client_does(server, spec, heads, source):
    size = 1 << 20
    batches = [TokenBatch.of(text_of(300, seed)) for seed in range(4)]
    forwards = [
        Forward(batch)
        if source == "tokens"
        else Forward(
            {layer: np.ascontiguousarray(ids[:, slice(*heads or (None,))]) for layer, ids in spec.hash(batch).items()}
        )
        for batch in batches
    ]
    (found,) = simulate(spec, heads, {"decode": forwards}, 60, (size,))
    with Client(server, cache_bytes=size, heads=heads, attach="off", max_steps=1) as client:
        for one in forwards:
            step, put = one.start(client), threading.Event()
            step.wait()
            step.delivery.on_idle(put.set)  # its rows are in the cache before the next one is planned
            assert put.wait(60)
    # What it saves is what of the distinct entries is not asked for.
    layout = Layout(spec, None if heads is None else slice(*heads))
    distinct = sum(
        len(np.unique(keys)) * part.entry_bytes
        for one in forwards
        for part, groups in cache_sizes.keys_by_part(spec, layout, one)
        for keys in groups
    )
    assert found.saved == {"decode": pytest.approx(1 - client.stats.bytes["wire"] / distinct)}
    assert 0.05 < found.saved["decode"] < 1
    assert found.evicted == client.cache.evicted > 0


def test_sizes_beyond_one_that_loses_nothing_are_left_out(spec):
    forwards = [Forward(TokenBatch.of(text_of(50))), Forward(TokenBatch.of(text_of(50)))]
    sizes = (1, 1 << 17, 1 << 22, 1 << 23, 1 << 24)
    found = simulate(spec, None, {"prefill": forwards[:1], "decode": forwards[1:]}, 60, sizes)
    assert [size.nbytes for size in found] == [1 << 17, 1 << 22]
    assert found[0].evicted
    assert found[-1] == CacheSize(1 << 22, pytest.approx(0.5), {"prefill": 0.0, "decode": 1.0}, 0)


def test_ids_without_keys_are_not_simulated(spec):
    assert simulate(spec, None, {"decode": [Forward({1: np.arange(5)})]}, 60) == []


def test_simulated_caches_take_little_memory(spec, monkeypatch):
    made = []
    monkeypatch.setattr(cache_sizes, "HotRows", lambda *arguments: made.append(HotRows(*arguments)) or made[-1])
    simulate(spec, None, {"decode": [Forward(TokenBatch.of(text_of(4)))]}, 60, (1 << 28,))
    real = HotRows(1 << 28, Layout(spec, None).entry_bytes)
    assert len(made[0].rows) == len(real.rows)
    assert made[0].rows.nbytes * 100 < real.rows.nbytes
