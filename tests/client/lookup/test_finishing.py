"""Rows in the caller's own form: arrays of any strides, flags of tokens, rows that there are not, what comes later."""

import gc
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engrampool_client import BatchError, Client, DeadlineError, ForkedError, PoolError, StepCancelledError
from engrampool_client.testing import serve_process
from engrampool_proto.hashing import TokenBatch
from engrampool_proto.synthetic import synthetic_rows
from forks import child
from server_fixtures import LIMIT_S, at_work, columns_of, eventually

SETTINGS = {
    "direct": {"attach": "off"},
    "grpc": {"attach": "off", "direct": "off"},
    "attached": {},
    "cache": {"attach": "off", "cache_bytes": 4 << 20},
    "tensor-parallel": {"attach": "off", "heads": (6, 13), "cache_bytes": 1 << 20},
    "numpy": {"attach": "off", "compiled": "off"},
}
FEWER = settings(max_examples=min(20, settings.default.max_examples), deadline=None)


@pytest.fixture(scope="module")
def process(packed):
    with serve_process(packed, workers=1) as process:
        yield process


@pytest.fixture(scope="module", params=SETTINGS.values(), ids=list(SETTINGS))
def client(process, request) -> Iterator[Client]:
    with Client(process.address, **request.param) as client:
        yield client


@pytest.fixture(scope="module")
def masking(process) -> Iterator[Client]:
    with Client(process.address, attach="off", on_failure="mask") as client:
        client.lookup(TOKENS)
        yield client


TOKENS = np.arange(5, dtype=np.int32)


def ids_of(client: Client, tokens: np.ndarray) -> dict[int, np.ndarray]:
    heads = columns_of(client)
    return {layer: ids[:, heads] for layer, ids in client.spec.hash(TokenBatch.of(tokens)).items()}


def rows_of(client: Client, ids: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    return {layer: synthetic_rows(client.spec.table(layer), some) for layer, some in ids.items()}


def same(step, wanted) -> bool:
    return all(np.array_equal(step.rows(layer), rows) for layer, rows in wanted.items())


def strided(how: str, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Memory full of sevens, and an array of that shape in it."""
    tokens, heads, row_bytes = shape
    if how == "heads first":
        memory = np.full((heads, tokens, row_bytes), 7, np.uint8)
        return memory, memory.transpose(1, 0, 2)
    if how == "padded columns":
        memory = np.full((tokens, heads + 3, row_bytes), 7, np.uint8)
        return memory, memory[:, :heads]
    if how == "padded rows":
        memory = np.full((tokens, heads, row_bytes + 8), 7, np.uint8)
        return memory, memory[..., :row_bytes]
    memory = np.full((2 * tokens, heads, row_bytes), 7, np.uint8)
    return memory, memory[::-2][:tokens]


# --- strides and flags


@FEWER
@given(
    st.integers(1, 200), st.sampled_from(["heads first", "padded columns", "padded rows", "reversed"]), st.booleans()
)
def test_rows_are_written_to_arrays_of_any_strides_and_nowhere_else(client, tokens, how, by_ids):
    batch = np.random.default_rng(tokens).integers(0, 50, tokens).astype(np.int32)
    ids = ids_of(client, batch)
    wanted = rows_of(client, ids)
    shapes = {layer: rows.shape for layer, rows in wanted.items()}
    memory, out = {}, {}
    for layer, shape in shapes.items():
        memory[layer], out[layer] = strided(how, shape)
    valid = {layer: np.zeros(tokens, np.bool_) for layer in shapes}
    settings = {"out": out, "valid": valid}
    step = client.prefetch_rows(ids, **settings) if by_ids else client.prefetch(batch, **settings)
    for layer, rows in wanted.items():
        assert step.rows(layer) is out[layer]
        assert np.array_equal(out[layer], rows)
        assert valid[layer].all()
        untouched, there = strided(how, shapes[layer])
        there[...] = rows
        assert np.array_equal(memory[layer], untouched)
    for layer in out:
        memory[layer][...] = 7
    assert same_rows(client.lookup(batch, out=out), wanted)
    assert all(np.array_equal(out[layer], rows) for layer, rows in wanted.items())


def same_rows(found, wanted) -> bool:
    return list(found) == list(wanted) and all(np.array_equal(found[layer], wanted[layer]) for layer in wanted)


def test_layers_may_lie_in_turns_in_one_array(client):
    wanted = rows_of(client, ids_of(client, TOKENS))
    shape = wanted[client.spec.layers[0]].shape
    memory = np.zeros((shape[0], len(wanted), *shape[1:]), np.uint8)
    out = {layer: memory[:, at] for at, layer in enumerate(wanted)}
    assert same(client.prefetch(TOKENS, out=out), wanted)
    with pytest.raises(BatchError, match="share memory"):
        client.prefetch(TOKENS, out=dict.fromkeys(wanted, memory[:, 0]))


def test_flags_that_cannot_take_it_are_refused(client):
    layer = client.spec.layers[0]
    for valid, text in (
        ({layer: np.zeros(4, np.bool_)}, r"valid of layer \d+ must be a bool array \[5\]; it is bool \[4\]"),
        ({layer: np.zeros(5, np.uint8)}, r"it is uint8 \[5\]"),
        ({layer: [True] * 5}, "it is list"),
        ({layer: np.broadcast_to(np.array([True]), 5)}, "must be writable"),
        ({-1: np.zeros(5, np.bool_)}, "valid has an array for layer -1, which is not asked for"),
        ([1], "valid must be a dict"),
    ):
        with pytest.raises(BatchError, match=text):
            client.prefetch(TOKENS, valid=valid)
        with pytest.raises(BatchError, match=text):
            client.lookup(TOKENS, valid=valid)
    eventually(lambda: not client.stats.pending_bytes, "nothing is left")


@pytest.mark.parametrize("how", ["raise", "mask"])
def test_tokens_without_rows_are_flagged_before_the_layer_is_settled(process, how):
    with Client(process.address, attach="off", on_failure=how) as client, process.frozen():
        shapes = {layer: rows.shape for layer, rows in rows_of(client, ids_of(client, TOKENS)).items()}
        memory = {layer: strided("heads first", shape) for layer, shape in shapes.items()}
        valid = {layer: np.ones(5, np.bool_) for layer in shapes}
        seen = []
        step = client.prefetch(TOKENS, out={layer: two[1] for layer, two in memory.items()}, valid=valid, timeout_s=0.3)
        step.add_callback(lambda step, layer: seen.append(valid[layer].any()))
        if how == "raise":
            with pytest.raises(DeadlineError):
                step.wait()
        else:
            step.wait()
            assert all(not two[0].any() for two in memory.values())
            assert all(step.rows(layer) is memory[layer][1] for layer in shapes)
        assert seen == [False] * len(shapes)


# --- rows that there are not


@FEWER
@given(st.integers(0, 200), st.floats(0, 1), st.integers(0, 99), st.sampled_from([None, "own", "heads first", "apart"]))
def test_no_row_is_zeros(client, tokens, part, seed, out_is):
    random = np.random.default_rng(seed)
    ids = ids_of(client, random.integers(0, 50, tokens).astype(np.int32))
    wanted = rows_of(client, ids)
    asked = {}
    for layer, some in ids.items():
        holes = np.broadcast_to(random.random((tokens, 1 if seed % 2 else some.shape[1])) < part, some.shape)
        asked[layer] = np.where(holes, -1, some.astype(np.int32 if seed % 3 else np.int64))
        wanted[layer][holes] = 0
    out = None
    if out_is == "apart":
        out = {layer: {"scales": np.full((*rows.shape[:-1], 8), 7, np.uint8)} for layer, rows in wanted.items()}
    elif out_is is not None:
        out = {
            layer: np.full(rows.shape, 7, np.uint8) if out_is == "own" else strided(out_is, rows.shape)[1]
            for layer, rows in wanted.items()
        }
    before = {layer: some.copy() for layer, some in asked.items()}
    step = client.prefetch_rows(asked, out=out, absent=True)
    assert same(step, wanted)
    assert all(step.valid(layer).all() for layer in wanted)
    assert same_rows(client.lookup_rows(asked, out=out, absent=True), wanted)
    assert same_rows(asked, before)
    if out_is == "apart":
        assert all(np.array_equal(out[layer]["scales"], rows[..., 256:]) for layer, rows in wanted.items())


def test_other_negative_ids_are_refused_and_so_is_this_one_unless_it_is_said(client):
    width = client.dummy(1).rows(1).shape[1]
    with pytest.raises(BatchError, match="row id -1"):
        client.lookup_rows({1: np.full((1, width), -1)})
    with pytest.raises(BatchError, match="row id -2"):
        client.lookup_rows({1: np.full((1, width), -2)}, absent=True)
    with pytest.raises(BatchError, match="row id -2"):
        client.prefetch_rows({1: np.array([[-1] * width, [-2] * width])}, absent=True).wait()


def test_duplicates_are_found_beside_rows_that_there_are_not(process):
    tokens = np.tile(TOKENS, 100)
    with Client(process.address, attach="off") as client:
        ids = {layer: some.astype(np.int64) for layer, some in ids_of(client, tokens).items()}
        holes = {layer: np.where(tokens[:, None] == 3, -1, some) for layer, some in ids.items()}
        client.prefetch_rows(holes, absent=True).wait()
        assert client.stats.bytes["duplicate"] > client.stats.bytes["server"]


# --- what comes later


@pytest.mark.parametrize("tokens", [1, 5, 200])
@pytest.mark.parametrize("by", ["tokens", "ids"])
def test_what_is_asked_for_may_come_later(client, tokens, by):
    batch = np.random.default_rng(tokens).integers(0, 50, tokens).astype(np.int32)
    ids, later = ids_of(client, batch), threading.Event()
    wanted = rows_of(client, ids)
    if by == "tokens":
        given = np.full(tokens, -7, np.int32)

        def ready():
            assert later.wait(LIMIT_S)
            given[:] = batch

        step = client.prefetch(given, ready=ready)
    else:
        given = {layer: np.full(some.shape, -7, np.int64) for layer, some in ids.items()}

        def ready():
            assert later.wait(LIMIT_S)
            for layer, some in ids.items():
                given[layer][...] = some
                given[layer][0] = -1

        step = client.prefetch_rows(given, ready=ready, absent=True)
        for rows in wanted.values():
            rows[0] = 0
    first = client.spec.layers[0]
    with pytest.raises(DeadlineError):
        step.rows(first, timeout_s=0.0)
    came = []
    waiter = threading.Thread(target=lambda: came.append(step.rows(first)))
    waiter.start()
    eventually(lambda: step.delivery._waiting, "somebody waits")
    later.set()
    waiter.join()
    assert np.array_equal(came[0], wanted[first])
    assert same(step, wanted)


@pytest.mark.parametrize("when", ["before", "after"])
def test_who_is_told_and_never_waits_gets_what_comes_later(client, when):
    later, told = threading.Event(), threading.Semaphore(0)
    step = client.prefetch(TOKENS, ready=later.wait)
    if when == "before":
        step.add_callback(lambda step, layer: told.release())
        later.set()
    else:
        later.set()
        step.add_callback(lambda step, layer: told.release())
    assert all(told.acquire(timeout=LIMIT_S) for _ in step.layers)
    assert same(step, rows_of(client, ids_of(client, TOKENS)))


def test_nobody_need_look(client):
    step = client.prefetch(TOKENS, ready=lambda: None)
    eventually(lambda: step.delivery.done, "it came")
    assert same(step, rows_of(client, ids_of(client, TOKENS)))


def test_what_never_comes_is_how_the_step_ends(client):
    def ready():
        raise OSError("the device is lost")

    step = client.prefetch(TOKENS, ready=ready)
    with pytest.raises(PoolError, match="the device is lost"):
        step.wait()
    assert isinstance(step.error.__cause__, OSError)
    bad = np.zeros(5, np.int32)
    step = client.prefetch(bad, ready=lambda: bad.__setitem__(2, -7))
    with pytest.raises(BatchError, match="-7"):
        step.wait()
    with pytest.raises(BatchError, match="must be int32 arrays"):
        client.prefetch([1, 2], ready=lambda: None)
    eventually(lambda: not client.stats.pending_bytes, "nothing is left")


@pytest.mark.parametrize("way", ["deadline", "cancel", "dropped", "close"])
def test_a_step_whose_tokens_do_not_come_ends_all_the_same(process, way):
    later = threading.Event()
    with Client(process.address, attach="off", max_steps=1) as client:
        wanted = rows_of(client, ids_of(client, TOKENS))
        out = {layer: np.full(rows.shape, 7, np.uint8) for layer, rows in wanted.items()}
        step = client.prefetch(TOKENS, ready=later.wait, out=out, timeout_s=0.2 if way == "deadline" else None)
        if way == "deadline":
            with pytest.raises(DeadlineError):
                step.rows(1)
        elif way == "cancel":
            step.cancel()
            with pytest.raises(StepCancelledError):
                step.rows(1)
        elif way == "dropped":
            del step
            eventually(lambda: not client.stats.pending_bytes, "it was cancelled")
        else:
            closing = threading.Thread(target=client.close)
            closing.start()
            with pytest.raises(StepCancelledError):
                step.wait()
            later.set()
            closing.join()
        later.set()
        if way != "close":
            # The thread that was held serves others.
            assert same(client.prefetch(TOKENS), wanted)
            eventually(lambda: at_work(client) == (0, 0, 0), "nothing is left")
        assert all((rows == 7).all() for rows in out.values())


def test_a_child_of_a_fork_has_nothing_of_it(process):
    later = threading.Event()
    with Client(process.address, attach="off") as client:
        step = client.prefetch(TOKENS, ready=later.wait)

        def look() -> bytes:
            with pytest.raises(ForkedError):
                step.rows(1)
            return b"good"

        assert child(look) == b"good"
        later.set()
        assert same(step, rows_of(client, ids_of(client, TOKENS)))


# --- the cache only


def test_rows_that_came_into_the_cache_serve_a_batch_of_another_form(process):
    with Client(process.address, attach="off", cache_bytes=8 << 20) as client:
        prompt = np.arange(40, dtype=np.int32)
        assert client.hint(prompt)
        eventually(lambda: not client.stats.pending_hint_bytes, "the hint has ended")
        asked = client.stats.bytes["server"]
        step = client.prefetch(prompt[20:], lookback=prompt[None, [19, 18, 17]][:, : client.spec.lookback])
        step.wait()
        assert client.stats.bytes["server"] == asked
        whole = rows_of(client, ids_of(client, prompt))
        assert same(step, {layer: rows[20:] for layer, rows in whole.items()})
        with pytest.raises(BatchError):
            client.hint([1 << 30])
        assert not client.hint(np.empty(0, np.int32))
    with Client(process.address, attach="off") as client, pytest.raises(ValueError, match="cache_bytes"):
        client.hint(TOKENS)


# --- what a caller does with what it gave


@pytest.mark.parametrize("by", ["tokens", "ids"])
def test_what_was_given_is_what_was_given_when_the_step_began(process, by):
    """The dicts may be the next step's at once, and arrays may be put into them before this step's are there."""
    later, other = threading.Event(), TOKENS + 10
    with Client(process.address, attach="off", cache_bytes=1 << 20) as client:
        ids, others = ids_of(client, TOKENS), ids_of(client, other)
        wanted = rows_of(client, ids)
        arrays = {layer: np.full(rows.shape, 7, np.uint8) for layer, rows in wanted.items()}
        flags = {layer: np.zeros(5, np.bool_) for layer in wanted}
        given, out, valid = dict(ids), dict(arrays), dict(flags)
        settings = {"out": out, "valid": valid, "ready": later.wait}
        step = client.prefetch_rows(given, **settings) if by == "ids" else client.prefetch(TOKENS, **settings)
        for layer in wanted:
            given[layer] = others[layer][:1]
            out[layer], valid[layer] = np.zeros(1, np.uint8), np.zeros(1, np.bool_)
        later.set()
        assert same(step, wanted)
        assert all(step.rows(layer) is arrays[layer] and flags[layer].all() for layer in wanted)
        segments = {layer: {"scales": np.zeros((5, rows.shape[1], 8), np.uint8)} for layer, rows in wanted.items()}
        kept = {layer: given["scales"] for layer, given in segments.items()}
        step = client.prefetch(TOKENS, out=segments, ahead=True)
        for apart in segments.values():
            apart.clear()
        assert same(step, wanted)
        assert all(np.array_equal(kept[layer], rows[..., 256:]) for layer, rows in wanted.items())


def test_arrays_that_changed_their_shape_meanwhile_are_refused(process):
    later, tokens = threading.Event(), TOKENS.copy()
    with Client(process.address, attach="off") as client:
        out = {
            layer: np.full(rows.shape, 7, np.uint8) for layer, rows in rows_of(client, ids_of(client, TOKENS)).items()
        }
        ids = {layer: some.copy() for layer, some in ids_of(client, tokens).items()}
        step = client.prefetch_rows(ids, out=out, ready=later.wait)
        for some in ids.values():
            some.resize((9, some.shape[1]), refcheck=False)
        later.set()
        with pytest.raises(BatchError, match="other shapes by now"):
            step.wait()
        assert all((rows == 7).all() for rows in out.values())


def test_arrays_of_int32_by_another_name_may_be_filled_later(client):
    named = TOKENS.astype(np.dtype("i4", metadata={"from": "elsewhere"}))
    assert same(client.prefetch(named, ready=lambda: None), rows_of(client, ids_of(client, TOKENS)))
    lasting = np.frombuffer(bytearray(TOKENS.tobytes()), np.int32).view(np.recarray)
    assert same(client.prefetch(lasting, ready=lambda: None), rows_of(client, ids_of(client, TOKENS)))


def test_flags_that_share_memory_are_refused(client):
    shapes = {layer: rows.shape for layer, rows in rows_of(client, ids_of(client, TOKENS)).items()}
    one = np.zeros(5, np.bool_)
    layer = client.spec.layers[0]
    out = np.zeros(shapes[layer], np.uint8)
    for arguments, text in (
        ({"valid": dict.fromkeys(shapes, one)}, "and valid of layer 1 share memory"),
        ({"valid": {layer: np.lib.stride_tricks.as_strided(one, (5,), (0,))}}, "overlaps itself"),
        ({"valid": {layer: out.reshape(-1)[:5].view(np.bool_)}, "out": {layer: out}}, "out of layer 1 share memory"),
    ):
        with pytest.raises(BatchError, match=text):
            client.prefetch(TOKENS, **arguments)
    eventually(lambda: not client.stats.pending_bytes, "nothing is left")


# --- threads that wait for what does not come


def test_steps_that_wait_hold_up_no_other_step_nor_close(process):
    later, told = threading.Event(), threading.Semaphore(0)
    with Client(process.address, attach="off", max_steps=1) as client:
        wanted = rows_of(client, ids_of(client, TOKENS))
        waiting = [client.prefetch(TOKENS, ready=later.wait) for _ in range(6)]
        many = np.arange(3000, dtype=np.int32)
        large = client.prefetch(many)
        large.wait()
        small = client.prefetch(TOKENS)
        small.add_callback(lambda step, layer: told.release())
        assert all(told.acquire(timeout=LIMIT_S) for _ in small.layers)
        client.close()
        assert all(isinstance(step.error, StepCancelledError) for step in waiting)
        later.set()
        assert same(small, wanted)


def test_a_step_that_is_over_reads_nothing_when_its_ids_are_said_to_be_there(process, tmp_path):
    later = threading.Event()
    with Client(process.address, attach="off", record=tmp_path / "asked") as client:
        ids = ids_of(client, TOKENS)
        step = client.prefetch_rows(ids, ready=later.wait)
        step.cancel()
        before = (tmp_path / "asked").stat().st_size
        later.set()
        eventually(lambda: at_work(client) == (0, 0, 0), "nothing is left")
        client.lookup(TOKENS)
    assert before < (tmp_path / "asked").stat().st_size < before + 4 * sum(some.nbytes for some in ids.values())


def test_even_an_exit_is_how_the_step_ends(client):
    def ready():
        raise SystemExit("over")

    with pytest.raises(PoolError, match="over"):
        client.prefetch(TOKENS, ready=ready).wait()


def test_a_step_that_is_lost_in_a_circle_waits_for_nobody(process):
    """Its collector may hold a lock that whoever writes the step's rows waits for, the cache's say."""
    with Client(process.address, attach="off", cache_bytes=1 << 20) as client:
        step = client.prefetch(TOKENS, ready=threading.Event().wait, timeout_s=2 * LIMIT_S)
        delivery, lock = step.delivery, client.cache.lock
        writes, wants = threading.Event(), threading.Thread(target=lambda: written(delivery, writes, lock))
        circle = [step]
        circle.append(circle)
        with client.cache.held():
            wants.start()
            assert writes.wait(LIMIT_S)
            del step, circle
            gc.collect()
            assert delivery.given_up
            assert not delivery.ended, "somebody writes yet"
        wants.join()
        assert delivery.ended


def written(delivery, writes, lock):
    with delivery.writing():
        writes.set()
        with lock:
            pass
