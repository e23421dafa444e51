"""Small lookups of a client with a cache, of any family, columns and cuts: each byte is the table's, asked for once."""

import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engrampool_client.compute.cache import HotRows
from engrampool_client.compute.forms import choose
from engrampool_client.compute.layout import Layout
from engrampool_client.compute.served import ServedModel
from engrampool_client.errors import DeadlineError, StepCancelledError
from engrampool_client.lookup.delivery import Delivery
from engrampool_client.lookup.landing import zeros
from engrampool_client.lookup.plan import EntriesPlan, Planner
from engrampool_client.lookup.query import RowQuery, TokenQuery
from engrampool_client.lookup.small import Cached
from engrampool_proto.hashing import Identity, Polynomial, TokenBatch, XorMix
from engrampool_proto.spec import ModelSpec, RowFormat, Segment, TableSpec
from engrampool_proto.synthetic import synthetic_rows
from server_fixtures import LIMIT_S, eventually

WEIGHTS = ((5, 3, 1), (7, 2, 9))
FAMILIES = {
    3: (2**33, 40, XorMix((2**61 + 3, -5, 7), ((101, 103), (107, 109)), 2, 4)),
    5: (500, 33, Polynomial(((97, 89), (83, 79)), (WEIGHTS, WEIGHTS))),
    9: (30, 8, Identity(30)),
}
SPEC = ModelSpec(
    "families",
    50,
    tuple(
        TableSpec(layer, rows, RowFormat((Segment("values", "uint8", width),)), family)
        for layer, (rows, width, family) in FAMILIES.items()
    ),
)
SERVED = ServedModel(SPEC, "v", 10**6, 10**8, "")
# Some columns, of all layers but the last; rows at which another shard begins, within a group of the first layer.
LAYOUTS = {
    "all": Layout(SPEC, None),
    "some": Layout(SPEC, slice(0, 1)),
    "cut": Layout(SPEC, None, {3: [0, 101], 5: [0, 97]}),
}


def planner(layout: Layout, cache_bytes: int) -> Planner:
    form = choose("on")
    return Planner(SERVED, layout, "client", True, HotRows(cache_bytes, layout.entry_bytes, form), None, 2, form)


def wanted_of(layout: Layout, batch: TokenBatch) -> dict[int, np.ndarray]:
    heads = layout.heads or slice(None)
    return {layer: synthetic_rows(SPEC.table(layer), ids[:, heads]) for layer, ids in SPEC.hash(batch).items()}


@st.composite
def batches(draw) -> TokenBatch:
    """Few different tokens, several requests, look-backs, maybe dead spans."""
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any))
    total, width, few = sum(lengths), draw(st.integers(0, 2)), draw(st.integers(2, 50))
    random = np.random.default_rng(draw(st.integers(0, 1000)))
    shape, flags = (len(lengths), width), draw(st.booleans())
    return TokenBatch(
        random.integers(0, few, total).astype(np.int32),
        np.cumsum([0, *lengths]).astype(np.int32),
        random.integers(-1, few, shape).astype(np.int32),
        random.random(total) < 0.2 if flags else None,
        random.random(shape) < 0.2 if flags else None,
    )


def arrays(batch: TokenBatch):
    return batch.tokens, batch.query_start_loc, batch.lookback, batch.dead, batch.lookback_dead


def served_rows(ids) -> np.ndarray:
    layer, rows = ids
    return synthetic_rows(SPEC.table(layer), rows)


def begun(plan: Planner, query, out=None, blank=None) -> tuple[Cached, Delivery]:
    cached = plan.cached(query, out, plan.sizes(query))
    delivery = Delivery(query.layers, blank=blank)
    cached.find(delivery)
    return cached, delivery


def come(cached: Cached, delivery: Delivery) -> None:
    """Have the rows come as a request would bring them."""
    if cached.small is not None:
        for layer, ids in cached.small.tables(SPEC):
            cached.small.rows[layer][...] = served_rows((layer, ids))
            with delivery.writing():
                cached.place(layer)
                cached.place(layer)  # once more does no harm
        delivery.arrived(dict(cached.small.given))
    cached.keep()
    cached.close()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
@given(
    some=st.lists(st.tuples(batches(), st.sampled_from(["tokens", "rows", "shaped", "out"])), min_size=1, max_size=4),
    small=st.booleans(),
)
def test_any_lookups_one_after_the_other_give_the_bytes_of_the_tables(layout, some, small):
    plan = planner(layout, 4000 if small else 1 << 20)
    for batch, how in some:
        wanted, query, out = wanted_of(layout, batch), TokenQuery(SPEC, arrays(batch), SPEC.layers), None
        if how == "out":
            out = {layer: np.full_like(rows, 7) for layer, rows in wanted.items()}
        elif how != "tokens":
            heads = layout.heads or slice(None)
            rows = {layer: ids[:, heads] for layer, ids in SPEC.hash(batch).items()}
            if how == "shaped":
                rows = {layer: ids[None] for layer, ids in rows.items()}
                wanted = {layer: one[None] for layer, one in wanted.items()}
            query = RowQuery(SPEC, rows)
        cached, delivery = begun(plan, query, out)
        asked = () if cached.small is None else cached.small.tables(SPEC)
        again = cached.query().ids(layout, plan.hashing)
        for layer, ids in SPEC.hash(batch).items():
            assert np.array_equal(again[layer].reshape(len(ids), -1), ids[:, layout.heads or slice(None)])
        come(cached, delivery)
        assert delivery.done
        for layer, rows in wanted.items():
            assert np.array_equal(delivery.rows[layer], rows)
            assert out is None or delivery.rows[layer] is out[layer]
        total = sum(rows.nbytes for rows in wanted.values())
        asked_bytes = sum(len(ids) * SPEC.table(layer).row_bytes for layer, ids in asked)
        assert sum(cached.sources.values()) + asked_bytes == total


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
@given(first=batches(), second=batches())
def test_it_finds_and_asks_for_what_other_lookups_do(layout, first, second):
    """Those by `EntriesPlan`, of any size."""
    plans = [planner(layout, 1 << 20) for _ in range(2)]
    for plan in plans:
        query = TokenQuery(SPEC, arrays(first), SPEC.layers)
        come(*begun(plan, query))
    query = TokenQuery(SPEC, arrays(second), SPEC.layers)
    cached, _ = begun(plans[0], query)
    delivery = Delivery(SPEC.layers)
    keys = query.keys(layout, plans[1].hashing)
    other = EntriesPlan(plans[1], delivery, keys, query.shapes(layout))
    asked = [] if other.exchange is None else other.exchange.asked.tables
    ours = [] if cached.small is None else cached.small.tables(SPEC)
    assert [layer for layer, _ in ours] == [layer for layer, _ in asked]
    for (_, ids), (_, wanted) in zip(ours, asked, strict=True):
        assert sorted(ids.tolist()) == sorted(wanted.tolist())
    counts = [(plan.cache.hits, plan.cache.misses, plan.cache.filled) for plan in plans]
    assert counts[0] == counts[1]
    sources = {name: nbytes for name, nbytes in other.sources.items() if nbytes}
    assert {name: nbytes for name, nbytes in cached.sources.items() if nbytes} == sources


@given(first=batches(), second=batches())
def test_what_stands_in_for_rows_that_do_not_come_is_what_the_cache_had_of_whole_tokens(first, second):
    layout, plan = LAYOUTS["all"], planner(LAYOUTS["all"], 1 << 20)
    come(*begun(plan, TokenQuery(SPEC, arrays(first), SPEC.layers)))
    query = TokenQuery(SPEC, arrays(second), SPEC.layers)
    out = {layer: np.full(shape, 7, np.uint8) for layer, shape in query.shapes(layout).items()}
    cached, delivery = begun(plan, query, out, zeros(query.shapes(layout), out))
    if cached.small is None:
        return
    wanted, known = wanted_of(layout, second), {layer for layer in SPEC.layers if layer in delivery.rows}
    layer = cached.small.what[2][0]
    cached.small.rows[layer][...] = served_rows(cached.small.tables(SPEC)[0])
    with delivery.writing():
        cached.place(layer)  # it came, and was not handed over
    delivery.give_up(DeadlineError("late"))
    for one in SPEC.layers:
        rows = delivery.rows[one]
        assert rows is out[one]
        if one in known:
            assert np.array_equal(rows, wanted[one])
            continue
        valid = delivery.valid[one]
        assert not valid.all()
        assert np.array_equal(rows[valid], wanted[one][valid])
        assert not rows[~valid].any()


def test_what_was_asked_for_otherwise_is_placed_and_kept_and_the_memory_serves_others():
    layout, batch = LAYOUTS["all"], TokenBatch.of(np.array([1, 2, 1, 2, 3], np.int32))
    for sent in (False, True):
        plan = planner(layout, 1 << 20)
        cached, delivery = begun(plan, TokenQuery(SPEC, arrays(batch), SPEC.layers))
        memory = cached.small.rows[3]
        exchange = cached.otherwise(delivery, sent).exchange
        for layer, ids in exchange.asked.tables:
            exchange.landing.copy_in(layer, 0, served_rows((layer, ids)).reshape(-1).data)
        exchange.landing.hand_over()
        for layer, rows in wanted_of(layout, batch).items():
            assert np.array_equal(delivery.rows[layer], rows)
        memory.fill(0xA5)  # whoever has it by now
        cached.keep()
        cached.close()
        assert bool(plan.scratch._spare) != sent
        whole, second = begun(plan, TokenQuery(SPEC, arrays(batch), SPEC.layers))
        assert whole.small is None
        for layer, rows in wanted_of(layout, batch).items():
            assert np.array_equal(second.rows[layer], rows)


def test_only_what_came_is_kept():
    layout, batch = LAYOUTS["all"], TokenBatch.of(np.array([1, 2], np.int32))
    plan = planner(layout, 1 << 20)
    cached, delivery = begun(plan, TokenQuery(SPEC, arrays(batch), SPEC.layers))
    cached.keep()
    assert plan.cache.filled == 0
    layer, ids = cached.small.tables(SPEC)[1]
    cached.small.rows[layer][...] = served_rows((layer, ids))
    with delivery.writing():
        cached.place(layer)
    cached.keep()
    assert plan.cache.filled == 2 * len(layout.parts[layer][0].groups)


def test_where_a_step_was_given_up_nothing_is_written():
    layout, batch = LAYOUTS["all"], TokenBatch.of(np.array([1, 2], np.int32))
    plan = planner(layout, 1 << 20)
    come(*begun(plan, TokenQuery(SPEC, arrays(batch), SPEC.layers)))
    query = TokenQuery(SPEC, arrays(batch), SPEC.layers)
    out = {layer: np.full(shape, 7, np.uint8) for layer, shape in query.shapes(layout).items()}
    cached, delivery = plan.cached(query, out, plan.sizes(query)), Delivery(SPEC.layers)
    delivery.give_up(StepCancelledError("it was cancelled"))
    with pytest.raises(StepCancelledError):
        cached.find(delivery)
    assert all((rows == 7).all() for rows in out.values())


def test_whoever_gives_a_step_up_waits_for_what_is_being_copied():
    """In whatever the cache's lock is waited for: then nothing is written into the caller's memory any more."""
    layout, batch = LAYOUTS["all"], TokenBatch.of(np.array([1, 2], np.int32))
    plan = planner(layout, 1 << 20)
    query, delivery = TokenQuery(SPEC, arrays(batch), SPEC.layers), Delivery(SPEC.layers)
    cached, ended = plan.cached(query, None, plan.sizes(query)), threading.Event()
    with plan.cache.lock:
        finding = threading.Thread(target=cached.find, args=(delivery,))
        finding.start()
        eventually(lambda: delivery._writers, "it is about to write")
        giving_up = threading.Thread(target=lambda: (delivery.give_up(StepCancelledError("it was")), ended.set()))
        giving_up.start()
        eventually(lambda: delivery.given_up, "it is given up")
        assert not ended.is_set()
    finding.join(LIMIT_S)
    giving_up.join(LIMIT_S)
    assert ended.is_set()
    assert delivery.ended


@pytest.mark.parametrize(
    ("what", "query"),
    [
        ("too many", TokenQuery(SPEC, (np.zeros(128, np.int32), None, None, None, None), SPEC.layers)),
        ("none", TokenQuery(SPEC, (np.zeros(0, np.int32), None, None, None, None), SPEC.layers)),
        ("not in the vocabulary", TokenQuery(SPEC, (np.full(2, 50, np.int32), None, None, None, None), SPEC.layers)),
        ("of no n-gram", RowQuery(SPEC, {9: np.zeros((4, 2), np.uint32)})),
        ("of one dimension", RowQuery(SPEC, {9: np.zeros(4, np.uint32)})),
        ("no row", RowQuery(SPEC, {9: np.full((4, 1), 30, np.uint32)})),
        ("no array", RowQuery(SPEC, {9: [[1]]})),
        ("of different lengths", RowQuery(SPEC, {9: np.zeros((4, 1), np.uint32), 5: np.zeros((3, 4), np.uint32)})),
    ],
)
def test_what_is_not_such_a_lookup_goes_another_way(what, query):
    plan = planner(LAYOUTS["all"], 1 << 20)
    assert plan.cached(query, None, plan.sizes(query)) is None
    segments = {9: {"values": np.empty((2, 1, 8), np.uint8)}}
    good = TokenQuery(SPEC, (np.zeros(2, np.int32), None, None, None, None), SPEC.layers)
    assert plan.cached(good, segments, plan.sizes(good)) is None
    little = Planner(replace(SERVED, max_rows=3), plan.layout, "client", True, plan.cache, None, 2, plan.form)
    assert little.cached(good, None, little.sizes(good)) is None
    assert plan.cached(good, None, plan.sizes(good)) is not None
