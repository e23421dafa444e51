"""What engines ask of a client beside lookups: hints, amended and dummy steps, comparisons, callbacks."""

import asyncio
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engrampool_client import AsyncClient, BatchError, Client, FingerprintError, SpecError
from engrampool_client.lookup.query import candidates_batch
from engrampool_proto.hashing import TokenBatch
from engrampool_proto.synthetic import synthetic_rows
from server_fixtures import eventually

ROW = 264


@pytest.fixture(scope="module")
def client(server):
    with Client(server, cache_bytes=32 << 20) as client:
        yield client


def wanted(client: Client, batch: TokenBatch) -> dict[int, np.ndarray]:
    return {n: synthetic_rows(client.spec.table(n), ids) for n, ids in client.spec.hash(batch).items()}


def decode(history: list[list[int]]) -> TokenBatch:
    """The step in which each request's last token is computed."""
    lookback = [[*reversed(past[:-1]), -1, -1, -1][:3] for past in history]
    bounds = np.arange(len(history) + 1, dtype=np.int32)
    return TokenBatch(np.array([past[-1] for past in history], np.int32), bounds, np.array(lookback, np.int32))


def arrays(batch: TokenBatch) -> tuple:
    return batch.tokens, batch.query_start_loc, batch.lookback


def wait_for_hints(client: Client) -> None:
    """Until every hint has ended."""
    pause = threading.Event()
    while client.stats.pending_hint_bytes:
        pause.wait(0.001)


# --- hints


@given(data=st.data())
def test_candidates_hash_as_the_tokens_that_come_true(spec, data):
    lengths = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=3))
    requests, width = len(lengths), data.draw(st.integers(0, 3))
    random = np.random.default_rng(data.draw(st.integers(0, 1000)))
    batch = TokenBatch(
        random.integers(0, 50, sum(lengths)).astype(np.int32),
        np.cumsum([0, *lengths]).astype(np.int32),
        random.integers(-1, 50, (requests, width)).astype(np.int32),
        random.random(sum(lengths)) < 0.2,
    )
    drafts = random.integers(0, 50, (requests, data.draw(st.integers(1, 3)))).astype(np.int32)
    guessed = spec.hash(candidates_batch(batch, drafts, True, spec))
    alternatives = spec.hash(candidates_batch(batch, drafts, False, spec))
    at = 0
    for request in range(requests):
        span = slice(batch.query_start_loc[request], batch.query_start_loc[request + 1])
        tokens = np.concatenate([batch.tokens[span], drafts[request]])
        dead = np.concatenate([batch.dead[span], np.zeros(drafts.shape[1], bool)])
        whole = TokenBatch.of(tokens, None, batch.lookback[request : request + 1], dead)
        for layer, rows in spec.hash(whole).items():
            count = drafts.shape[1]
            assert np.array_equal(guessed[layer][request * count : (request + 1) * count], rows[-count:])
            for number, one in enumerate(drafts[request]):
                tokens[len(tokens) - count] = one
                alone = TokenBatch.of(
                    tokens[: len(tokens) - count + 1],
                    None,
                    batch.lookback[request : request + 1],
                    dead[: len(tokens) - count + 1],
                )
                assert np.array_equal(alternatives[layer][at + number], spec.hash(alone, [layer])[layer][-1])
            tokens[-count:] = drafts[request]
        at += drafts.shape[1]


def test_missing_candidates_are_left_out(spec):
    batch = TokenBatch.of(np.array([5, 6], np.int32), np.array([0, 1, 2], np.int32))
    assert candidates_batch(batch, [[7, -1, 8], [-1, -1, -1]], False, spec).tokens.tolist() == [7, 8]
    chained = candidates_batch(batch, [[7, -1, 8], [9, 10, -1]], True, spec)
    assert chained.tokens.tolist() == [7, 9, 10]
    assert chained.query_start_loc.tolist() == [0, 1, 3]
    too_large = (np.array([[1, 2**32 + 5], [1, 2]]), [[1, 2**40], [1, 2]], [[1, spec.vocab_size], [1, 2]])
    for bad in ([7, 8], [[1]], [["x"], ["y"]], [[1.5], [2]], *too_large):
        with pytest.raises(BatchError):
            candidates_batch(batch, bad, False, spec)


@pytest.mark.parametrize("chain", [False, True])
def test_a_hint_that_comes_true_spares_the_next_step_its_lookup(server, chain):
    with Client(server, cache_bytes=32 << 20) as client:
        step = client.prefetch(*arrays(decode([[1, 2, 3], [4, 5]])))
        step.wait()
        if chain:
            assert step.hint([[10, 11], [20, 21]], chain=True)
            following = [decode([[1, 2, 3, 10], [4, 5, 20]]), decode([[1, 2, 3, 10, 11], [4, 5, 20, 21]])]
        else:
            assert step.hint([[9, 10, 8], [20, -1, 21]])
            following = [decode([[1, 2, 3, 10], [4, 5, 21]])]
        wait_for_hints(client)
        assert client.stats.hint_bytes["asked"] > 0
        before = client.stats.bytes["wire"]
        for batch in following:
            step = client.prefetch(*arrays(batch))
            for layer, rows in wanted(client, batch).items():
                assert np.array_equal(step.rows(layer), rows)
        hinted = client.cache.hinted_used_bytes
        assert hinted == len(following) * 2 * 48 * ROW
        # The hint's own rows came over the wire; the steps' did not.
        assert client.stats.bytes["wire"] == before


def test_hints_have_a_budget_and_need_a_cache(server):
    with Client(server, cache_bytes=8 << 20, hint_bytes=3 * 48 * ROW) as client:
        step = client.prefetch([1, 2, 3])
        assert not step.hint([[1, 2, 3, 4]])
        assert client.stats.hint_bytes["dropped"] == 4 * 48 * ROW
        assert step.hint([[1, 2, 3]])
        wait_for_hints(client)
        assert not step.hint([[-1]])  # nothing to ask for
        assert client.stats.pending_hint_bytes == 0
        rows = client.prefetch_rows({1: np.zeros((1, 24), np.int64)})
        with pytest.raises(ValueError, match="a step of tokens"):
            rows.hint([[1]])
        rows.wait()
    with Client(server) as client, pytest.raises(ValueError, match="needs a client with cache_bytes"):
        client.prefetch([1]).hint([[1]])


# --- amended steps


@pytest.mark.parametrize("cache_bytes", [0, 32 << 20])
@pytest.mark.parametrize("let_finish", [True, False])
def test_an_amended_step_has_the_rows_of_its_own_tokens(server, cache_bytes, let_finish):
    with Client(server, cache_bytes=cache_bytes) as client:
        drafts = np.arange(100, 400, dtype=np.int32)
        accepted = np.concatenate([drafts[:250], np.arange(5, 55, dtype=np.int32)])
        out = {layer: np.empty((300, 24, ROW), np.uint8) for layer in (1, 14)}
        step = client.prefetch(drafts, out=out)
        if let_finish:
            step.wait()
        before = client.stats.bytes["wire"]
        amended = client.amend(step, accepted, out=out)
        for layer, rows in wanted(client, TokenBatch.of(accepted)).items():
            assert np.array_equal(amended.rows(layer), rows)
        amended.wait()
        assert step.done()
        if cache_bytes and let_finish:
            assert client.stats.bytes["wire"] - before <= 50 * 48 * ROW
        for layer, rows in wanted(client, TokenBatch.of(accepted)).items():
            assert np.array_equal(out[layer], rows)


# --- dummy steps


def test_a_dummy_step_asks_nobody(server):
    with Client(server, heads=(0, 12)) as client:
        out = {14: np.full((7, 12, ROW), 7, np.uint8)}
        step = client.dummy(7, out=out)
        assert step.done()
        step.wait()
        for layer in (1, 14):
            assert step.rows(layer).shape == (7, 12, ROW)
            assert not step.rows(layer).any()
            assert step.valid(layer).tolist() == [False] * 7
        assert step.rows(14) is out[14]
        assert list(client.dummy(0, layers=[14]).layers) == [14]
        with pytest.raises(BatchError, match="out of layer 14"):
            client.dummy(6, out=out)
        with pytest.raises(SpecError, match="no layer 3"):
            client.dummy(6, layers=[3])
        assert (client.stats.begun, sum(client.stats.bytes.values())) == (0, 0)


# --- comparisons


def test_an_engines_row_ids_are_compared_with_ours(server):
    batch = TokenBatch.of(np.arange(20, dtype=np.int32))
    for heads in (None, (8, 16)):
        with Client(server, heads=heads) as client:
            columns = slice(*heads) if heads else slice(None)
            theirs = {n: ids[:, columns].astype(np.int64) for n, ids in client.spec.hash(batch).items()}
            client.verify(theirs, batch.tokens)
            theirs[14][3, 2] += 1
            theirs[14][5, 1] += 1
            with pytest.raises(
                FingerprintError, match=r"layer 14: 2 of \d+ row ids, the first of token 3, head 2"
            ) as caught:
                client.verify(theirs, batch.tokens)
            assert len(caught.value.differences) == 1
            with pytest.raises(FingerprintError, match=r"layer 1: row ids \[20, "):
                client.verify({1: theirs[1][:, :3]}, batch.tokens)
            with pytest.raises(BatchError, match="row ids of layer 1 must be an integer array; they are float64"):
                client.verify({1: theirs[1] + 0.0}, batch.tokens)


def test_an_engines_layout_is_compared_at_start(client):
    sizes = {table.layer: table.hash.head_rows() for table in client.spec.tables}
    token_map = client.spec.token_map.ids
    client.check_layout(sizes, ROW, token_map)
    other_sizes = {1: sizes[1], 14: (*sizes[14][:-1], sizes[14][-1] + 2)}
    other_map = np.where(token_map == 1, 0, np.where(token_map == 0, 1, token_map))
    for arguments, text in (
        ((other_sizes, ROW, token_map), r"layer_14: rows of head 23: \d+ here, \d+ there"),
        (({1: sizes[1]}, ROW, token_map), r"layers: \[1\] here, \[1, 14\] there"),
        (({**sizes, 14: sizes[14][:8]}, ROW, token_map), "layer_14: 8 heads here, 24 there"),
        ((sizes, 256, token_map), "layer_1: 256 bytes a row here, 264 there"),
        ((sizes, ROW, other_map), "token map: digest"),
        ((sizes, ROW, None), "token map: digest None here"),
    ):
        with pytest.raises(FingerprintError, match=text):
            client.check_layout(*arguments)
    with pytest.raises(BatchError, match=r"token_map cannot be made int32: token_map\[3\] is 42949672"):
        client.check_layout(sizes, ROW, token_map + (np.arange(len(token_map)) == 3) * 2**32)
    with pytest.raises(FingerprintError, match=r"layer_1: rows of head 0: .*\.5 here"):
        client.check_layout({**sizes, 1: (sizes[1][0] + 0.5, *sizes[1][1:])}, ROW, token_map)
    client.check_layout(sizes, ROW, token_map.tolist())
    numbers = {table.layer: list(table.hash.multipliers) for table in client.spec.tables}
    fill = client.spec.tables[0].hash.fill
    client.check_layout(sizes, ROW, token_map, numbers, fill)
    for constants, text in (
        (({**numbers, 14: [3, *numbers[14][1:]]}, fill), r"layer_14: multipliers \(3, .* here, "),
        ((numbers, fill + 1), f"layer_1: fill {fill + 1} here, {fill} there; layer_14: fill"),
        ((numbers, fill, 7), "layer_1: stop 7 here, None there"),
        (({1: numbers[1]}, fill), r"layer_14: multipliers \(\) here"),
    ):
        with pytest.raises(FingerprintError, match=text):
            client.check_layout(sizes, ROW, token_map, *constants)
    assert other_map.flags.writeable


# --- waiting


def test_steps_are_waited_for_by_callbacks_from_any_thread(client):
    told, all_told = [], threading.Event()

    def tell(step, layer):
        told.append((layer, step.rows(layer).shape))
        if len(told) == 16:
            all_told.set()

    def submit(seed):
        client.prefetch(np.arange(300 * seed, 300 * seed + 300, dtype=np.int32)).add_callback(tell)

    threads = [threading.Thread(target=submit, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all_told.wait(60)
    assert sorted(told) == [(1, (300, 24, ROW))] * 8 + [(14, (300, 24, ROW))] * 8


def test_asyncio_has_the_same(server):
    async def run():
        async with await AsyncClient.connect(server, cache_bytes=8 << 20, on_failure="mask") as client:
            batch = decode([[1, 2, 3]])
            step = client.prefetch(*arrays(batch))
            assert (await step.valid(1)).all()
            assert step.hint([[4]])
            await asyncio.to_thread(wait_for_hints, client.client)
            amended = client.amend(step, [1, 2, 3, 4])
            assert (await amended.rows(14)).shape == (4, 24, ROW)
            await asyncio.to_thread(amended.step.wait)
            assert amended.done()
            await asyncio.to_thread(eventually, lambda: client.client.stats.steps["ok"] == 2, "both are counted")
            assert sum(client.client.stats.waits[1].counts) == 1  # `valid` waited, and was counted once
            assert step.wait_s[1] == client.client.stats.waits[1].sum_s > 0

    asyncio.run(run())
