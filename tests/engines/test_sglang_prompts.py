"""SGLang's own scheduler makes the batches, and each forward reads what it reads of the table that SGLang stocks."""

import json
import os
import signal
import time
from array import array
from contextlib import suppress
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from engrampool_client import FingerprintError, PoolError
from engrampool_client.integrations.forwards.settings import ENGINE_PREFIX
from engrampool_client.integrations.forwards.supply import Supply
from engrampool_client.testing import serve_process
from scripted_client import Scripted
from server_fixtures import LIMIT_S, lasting_address
from small_model import write_model

torch = pytest.importorskip("torch", reason="PyTorch is not installed; `make test-engines` installs it")
pytest.importorskip("sglang", reason="the engines are not there; `make test-engines` unpacks them")
from safetensors.torch import save_file  # noqa: E402  (needs torch)

from sglang_ranks import (  # noqa: E402  (needs torch)
    CHUNK,
    LONGEST,
    Ranks,
    checkpoint,
    forward_of,
    hasher_maker,
    scheduled,
    step,
    unstaged,
    with_plugin,
)
from sglang_scheduler import Loop  # noqa: E402  (needs torch)

SLOTS, AHEAD, PIECE = 12, 96, 16


@pytest.fixture(scope="module")
def engine(server):
    from sglang.srt.runtime_context import get_context

    with (
        get_context().override_server_args(device="cpu", pp_max_micro_batch_size=SLOTS, chunked_prefill_size=64),
        with_plugin(server) as engine,
    ):
        yield engine


@pytest.fixture(autouse=True)
def small_pieces(engine, monkeypatch):
    """So that a prompt here has several of them."""
    monkeypatch.setattr(engine.prompts, "Supply", partial(Supply, piece_tokens=PIECE))
    monkeypatch.setenv(f"{ENGINE_PREFIX}AHEAD_TOKENS", str(AHEAD))


@pytest.fixture(scope="module")
def make_hasher(engine, config, tokenizer_path):
    return hasher_maker(engine, config, tokenizer_path)


@pytest.fixture
def ranks(engine, config, server, make_hasher, monkeypatch):
    """Ranks of a size; made, and closed at the end."""
    made = []

    def ranks(size, **settings):
        made.append(Ranks(engine, config, monkeypatch, size, make_hasher, **{"target": server.address, **settings}))
        return made[-1]

    yield ranks
    for one in made:
        one.close()


def forward_batch(batch):
    """What the model is given of a scheduler's batch."""
    forward = SimpleNamespace(
        forward_mode=batch.forward_mode,
        req_pool_indices=batch.req_pool_indices,
        engram_history=None,
        engram_staged_rows=None,
        out_cache_loc=batch.out_cache_loc,
    )
    if batch.forward_mode.is_decode():
        forward.positions = batch.seq_lens - 1
        return forward
    lengths = np.array(batch.extend_lens)
    forward.positions = torch.cat(
        [torch.arange(start, start + count) for start, count in zip(batch.prefix_lens, lengths, strict=True)]
    )
    forward.extend_seq_lens, forward.extend_seq_lens_cpu = torch.from_numpy(lengths), lengths.tolist()
    forward.extend_start_loc = torch.from_numpy(lengths.cumsum() - lengths)
    forward.engram_history, forward.engram_staged_rows = batch.engram_history, batch.engram_staged_rows
    return forward


class Engine:
    """A scheduler's loop over one rank, each of whose forwards is compared with the stocked layers."""

    def __init__(self, group, spec, same_bits, seed, *, wanted=lambda: True, often=0.3, **settings):
        self.made, self.random, self.wanted = group.made[0], np.random.default_rng(seed), wanted
        self.stocked, self.same_bits = group.stock(spec)[0], same_bits
        settings = {"kv_tokens": 420, "chunk": 64, "slots": SLOTS, "longest": 512, **settings}
        self.loop = Loop(self.made.manager, self.forward, **settings)
        self.prefix = self.random.integers(0, 900, 90).tolist()
        self.turns = self.aborted = self.hits = self.wrong = 0
        self.seen, self.begun, self.often = [], [], often

    def forward(self, batch):
        forward, tokens = forward_batch(batch), batch.input_ids
        self.seen.append((batch.forward_mode.name, forward.engram_staged_rows is not None))
        if batch.forward_mode.is_extend():
            for request, prefix in zip(batch.reqs, batch.prefix_lens, strict=True):
                self.hits += 0 if request in self.begun else prefix
                self.begun.append(request)
        ids = self.made.hasher(tokens, forward)
        for at, (layer, stocked) in enumerate(zip(self.made.layers, self.stocked, strict=True)):
            found = layer.embed_rows(ids[:, at], forward, False)
            right = stocked.embed_rows(ids[:, at], unstaged(forward), False)
            if self.wanted():
                self.same_bits("sglang", f"EngramEmbedding, {batch.forward_mode.name} of a scheduler", right, found)
            else:
                same = (found.view(torch.int16) == right.view(torch.int16)).flatten(1).all(1)
                assert (same | ~found.view(torch.int16).flatten(1).any(1)).all(), "a token has its rows, or zeros"
                self.wrong += int((~same).sum())
        return self.random.integers(0, 900, len(batch.reqs))

    def run(self, turns, ingest=None):
        before = self.turns
        self.loop.run(lambda scheduler: (ingest or self.ingest)(scheduler) is not False and self.turns < before + turns)

    def ingest(self, scheduler):
        """Some turns bring requests, or have one aborted that waits, or is run in part, or decodes."""
        from sglang.srt.managers.io_struct import AbortReq

        self.turns += 1
        if self.random.random() < self.often and len(scheduler.waiting_queue) < 8:
            for at in range(int(self.random.integers(1, 4))):
                shared = self.prefix[: int(self.random.integers(90))]
                own = self.random.integers(0, 900, int(self.random.integers(1, 150))).tolist()
                most = int(self.random.integers(1, 40))
                scheduler._add_request_to_queue(self.loop.request(f"{self.turns}.{at}", shared + own, most))
        if self.random.random() < 0.1:
            for some in (scheduler.waiting_queue, [scheduler.chunked_req], scheduler.running_batch.reqs):
                if some and some[0] is not None and self.random.random() < 0.7:
                    scheduler.abort_request(AbortReq(rid=some[0].rid))
                    self.aborted += 1


def nothing_is_left(made, engine, ahead=AHEAD):
    """Once nothing waits, nothing is kept or held, and what was asked for early is served or thrown away."""
    engine._ran(None, SimpleNamespace(**IDLE))
    prompts = made.worker.prompts
    kept = len(prompts._histories.lengths)
    assert (len(prompts._held), sorted(prompts._free), prompts._histories.lengths.any()) == (0, [*range(kept)], False)
    assert len(prompts.supply._early._free) == 2 * ahead / PIECE, "that is all memory for what is asked for early"


IDLE = {
    "disaggregation_mode": SimpleNamespace(value="null"),
    "waiting_queue": [],
    "chunked_req": None,
    "disable_radix_cache": False,
}


@pytest.mark.parametrize(
    ("seed", "settings"),
    [
        (0, {}),
        (1, {"policy": "lpm"}),
        (2, {"radix": False}),
        (3, {"mixed": True}),
    ],
    ids=["fcfs", "lpm", "no prefixes", "mixed"],
)
def test_forwards_of_a_scheduler_read_what_they_read_of_the_stocked_table(
    ranks, engine, spec, same_bits, seed, settings
):
    """Chunks, prefix hits, aborted requests, in whatever order the engine makes batches of them."""
    group = ranks(1).make()
    with group.at(0) as made:
        running = Engine(group, spec, same_bits, seed, **settings)
        running.run(70)
        early = made.worker.counts.early
        assert early["served"] > 300, early
        assert running.aborted > 1
        assert (running.hits > 100) is settings.get("radix", True)
        assert {("EXTEND", True), ("DECODE", False)} <= set(running.seen)
        assert ("MIXED", True) in running.seen or not settings.get("mixed")
        assert (made.worker.counts.failed, made.worker.counts.masked) == (0, {1: 0, 14: 0})
        nothing_is_left(made, engine.ours)


def test_a_retracted_request_is_asked_for_as_what_it_is_then(ranks, engine, spec, same_bits, monkeypatch):
    """By the engine's own switch for tests: again and again one of several waits anew, with what it has by then."""
    import sglang.srt.managers.scheduler as scheduler_module

    monkeypatch.setattr(scheduler_module, "TEST_RETRACT", True)
    monkeypatch.setattr(scheduler_module, "TEST_RETRACT_INTERVAL", 4)
    group = ranks(1).make()
    with group.at(0) as made:
        running = Engine(group, spec, same_bits, 0)

        def ingest(scheduler):
            running.turns += 1
            if running.turns == 1:
                for name in "abc":
                    prompt = running.random.integers(0, 900, 50).tolist()
                    scheduler._add_request_to_queue(running.loop.request(name, prompt, 20))
            return len(running.loop.finished) < 3

        running.run(150, ingest)
        assert [len(one.output_ids) for one in running.loop.finished] == [20] * 3
        assert sum(one.retraction_count for one in running.loop.finished) > 0
        assert made.worker.counts.early["served"] > 0
        nothing_is_left(made, engine.ours)


@pytest.mark.parametrize("seed", range(2))
def test_answers_that_are_late_out_of_order_or_lost_cost_time_and_never_rows(
    ranks, engine, spec, same_bits, seed, monkeypatch
):
    fates = np.random.default_rng(seed)
    scripted = Scripted(spec, lambda _, ahead: fates.choice(["now", "late", "lost"][: 3 if ahead else 2]), seed)
    try:
        group = ranks(1).make()
        with group.at(0) as made:
            monkeypatch.setattr(made.worker.client, "prefetch", scripted.prefetch)
            running = Engine(group, spec, same_bits, 10 + seed)
            running.run(50)
            met = {(one.fate, one.ahead) for one in scripted.asked}
            assert met >= {("lost", True), ("late", True), ("late", False)}
            assert (made.worker.counts.failed, made.worker.counts.early["served"] > 100) == (0, True)
            nothing_is_left(made, engine.ours)
    finally:
        scripted.close()


def test_a_pool_that_is_killed_and_comes_back_costs_the_forwards_in_between(
    ranks, engine, spec, same_bits, tmp_path, monkeypatch
):
    """By SIGKILL, in the midst of the loop, with prompts on their way; and back on the same port."""
    address, packed = lasting_address(), write_model(tmp_path / "model", spec)
    monkeypatch.delenv(f"{ENGINE_PREFIX}AHEAD_TOKENS")  # a server refuses it
    with serve_process(packed, listen=address) as server:
        group = ranks(1, target=server.address, on_failure="mask", timeout_s=2, attach="off").make()
        with group.at(0) as made:
            away = []
            running = Engine(group, spec, same_bits, 20, wanted=lambda: not away, often=1)
            running.run(15)
            assert running.wrong == 0
            for pid in (server.process.pid, *server.worker_pids().values()):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            server.wait_ended()
            away.append(True)
            running.run(15)
            assert running.wrong > 0
            with serve_process(packed, listen=address):
                until, wrong = time.monotonic() + LIMIT_S, -1
                while wrong != running.wrong and time.monotonic() < until:
                    wrong = running.wrong
                    running.run(1)
                away.clear()
                running.run(15)
            nothing_is_left(made, engine.ours, CHUNK)


# --- what is asked for, and when


def asked(made, monkeypatch):
    """Notes of each lookup by tokens: how many, and whether it is for later."""
    found, prefetch = [], made.worker.client.prefetch

    def noted(tokens, *rest, **settings):
        found.append((len(tokens), settings.get("ahead", False)))
        return prefetch(tokens, *rest, **settings)

    monkeypatch.setattr(made.worker.client, "prefetch", noted)
    return found


def chunks(*lengths, start=0, requests=None):
    """A batch of the scheduler's, of these tokens of each request from `start` on."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    return SimpleNamespace(
        forward_mode=ForwardMode.EXTEND,
        req_to_token_pool=SimpleNamespace(req_to_token=torch.zeros(SLOTS, LONGEST)),
        encoder_swa_reset=None,
        prefix_lens=[start] * len(lengths),
        extend_lens=list(lengths),
        reqs=requests,
        engram_history=None,
        engram_staged_rows=None,
    )


def request_of(length, seed=0, **more):
    tokens = array("q", np.random.default_rng(seed).integers(0, 900, length).tolist())
    nothing = {"output_ids": array("q"), "last_node": None, "num_matched_prefix_tokens": 0}
    return SimpleNamespace(origin_input_ids=tokens, full_untruncated_fill_ids=tokens, **{**nothing, **more})


def run(made, batch):
    """A staged forward: its rows of layer 1, and of a table; the latter from the engine's own row ids."""
    batch = made.manager.prepare_for_forward(batch, chunked_req=None)
    staged = batch.engram_staged_rows is not None
    if staged:
        rows = [made.worker.rows(layer) for layer in made.worker.layers]
        ids, _ = made.hasher.hash_windows(*made.manager.engram_stager._windows(batch))
        for at, (layer, found) in enumerate(zip(made.worker.layers, rows, strict=True)):
            right = made.worker.client.lookup_rows({layer: ids[:, at].numpy()})[layer]
            np.testing.assert_array_equal(found.numpy(), right[:, made.layers[0].embed.columns])
    return staged


def after(engine, going_on=None, waiting=(), **more):
    """The scheduler has launched a batch."""
    engine.ours._ran(None, SimpleNamespace(**{**IDLE, "chunked_req": going_on, "waiting_queue": [*waiting], **more}))


def test_what_comes_next_is_asked_for_once_a_batchs_own_rows_are_there(ranks, engine, monkeypatch):
    with ranks(1).make().at(0) as made:
        long, next_one, matched = request_of(100), request_of(40, 1), request_of(60, 2, last_node=1)
        matched.num_matched_prefix_tokens = 50
        found = asked(made, monkeypatch)
        assert run(made, chunks(20, requests=[long]))
        assert found == [(20, False)], "nothing stands beside it"
        after(engine, long, [next_one, matched])
        later = [(PIECE, True)] * 5 + [(PIECE, True)] * 2 + [(8, True)] + [(10, True)]
        assert found[1:] == later, "of 80 tokens, of 40, and of the 10 that no prefix has"
        after(engine, long, [next_one, matched])
        assert found[1:] == later, "only once"
        assert run(made, chunks(80, start=20, requests=[long]))
        assert run(made, chunks(10, start=50, requests=[matched]))
        assert run(made, chunks(40, requests=[next_one]))
        assert found[1:] == later, "all of it was on its way"
        after(engine)
        assert made.worker.counts.early == {"served": 130, "thrown_away": 0}
        nothing_is_left(made, engine.ours)


def test_of_a_request_whose_cached_prefix_is_not_known_little_is_asked_for(ranks, engine, monkeypatch):
    monkeypatch.setattr(engine.prompts, "_UNMATCHED", 2 * PIECE)
    with ranks(1).make().at(0) as made:
        found = asked(made, monkeypatch)
        assert run(made, chunks(5, requests=[request_of(5)]))
        waiting = request_of(100, 1)
        after(engine, waiting=[waiting])
        assert found[1:] == [(PIECE, True)] * 2
        waiting.last_node, waiting.num_matched_prefix_tokens = 1, 70
        after(engine, waiting=[waiting])
        assert found[3:] == [(PIECE, True), (14, True)], "from where its prefix ends"
        assert run(made, chunks(30, start=70, requests=[waiting]))
        after(engine)
        assert made.worker.counts.early == {"served": 30, "thrown_away": 2 * PIECE}
        after(engine, waiting=[request_of(100, 2)], disable_radix_cache=True)
        assert found[5:] == [(PIECE, True)] * 6, "as far as it is set, where there are no prefixes"


def test_a_request_that_becomes_another_one_has_the_rows_of_what_it_is(ranks, engine, monkeypatch):
    """As where it is aborted in the queue, and its prompt is one token then; or images in it are numbered anew."""
    with ranks(1).make().at(0) as made:
        found = asked(made, monkeypatch)
        assert run(made, chunks(5, requests=[request_of(5)]))
        waiting = request_of(60, 1)
        after(engine, waiting=[waiting])
        waiting.full_untruncated_fill_ids = request_of(60, 2).full_untruncated_fill_ids
        assert run(made, chunks(60, requests=[waiting]))
        assert found[-1] == (60, False)
        other = request_of(60, 3)
        after(engine, waiting=[other])
        other.full_untruncated_fill_ids = array("q", [0])
        assert run(made, chunks(1, requests=[other]))
        after(engine)
        assert made.worker.counts.early == {"served": 0, "thrown_away": 120}
        nothing_is_left(made, engine.ours)


def test_where_decoding_is_disaggregated_what_waits_is_not_asked_for(ranks, engine, monkeypatch):
    with ranks(1).make().at(0) as made:
        found = asked(made, monkeypatch)
        assert run(made, chunks(5, requests=[request_of(5)]))
        after(engine, waiting=[request_of(60, 1)], disaggregation_mode=SimpleNamespace(value="decode"))
        assert len(found) == 1


def test_a_batch_that_there_is_no_memory_for_is_left_to_its_forward(ranks, engine, monkeypatch):
    monkeypatch.setattr(engine.prompts, "_REQUESTS", 3)
    with ranks(1).make().at(0) as made:
        assert run(made, chunks(CHUNK, requests=[request_of(CHUNK)]))
        assert not run(made, chunks(CHUNK + 1, requests=[request_of(CHUNK + 1)]))
        assert not run(made, chunks(*[5] * 4, requests=[request_of(5, seed) for seed in range(4)]))
        assert run(made, chunks(*[5] * 3, requests=[request_of(5, seed) for seed in range(3)]))
        after(engine, waiting=[request_of(60, 1)])
        nothing_is_left(made, engine.ours)


def test_what_goes_wrong_with_asking_early_costs_no_forward(ranks, engine, monkeypatch, caplog):
    with ranks(1).make().at(0) as made:
        assert run(made, chunks(5, requests=[request_of(5)]))
        after(engine, waiting=[SimpleNamespace()])
        assert "not asked for early" in caplog.text
        assert run(made, chunks(5, requests=[request_of(5, 1)]))


def test_each_row_comes_to_a_group_of_ranks_once(ranks):
    """So there is nothing for the ranks of a host to share, whose columns are each other's complement."""
    came = {}
    for size in (1, 4):
        group = ranks(size).make()
        group.known, group.parts = None, []
        for rank in range(size):
            with group.at(rank) as made:
                made.manager.prepare_for_forward(chunks(50, requests=[request_of(50)]), chunked_req=None)
                assert [len(made.worker.rows(layer)) for layer in made.worker.layers] == [50, 50]
        came[size] = sum(one.worker.client.stats.bytes["wire"] for one in group.made)
    assert came[1] == came[4] > 0


# --- verifying


@pytest.fixture
def local_checkpoint(tmp_path, spec, monkeypatch):
    """A checkpoint's tables in files, with which rows are compared; and what makes rows of them other ones."""

    def write(change=0):
        tensors = {}
        for layer in spec.layers:
            values, scales = checkpoint(spec, layer)
            tensors[f"layers.{layer}.engram.embed.weight"] = (values.view(torch.uint8) ^ change).view(values.dtype)
            tensors[f"layers.{layer}.engram.embed.scale"] = scales
        save_file(tensors, tmp_path / "tables.safetensors")
        index = {"weight_map": dict.fromkeys(tensors, "tables.safetensors")}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))

    write()
    monkeypatch.setenv(f"{ENGINE_PREFIX}VERIFY", "1")
    monkeypatch.setenv(f"{ENGINE_PREFIX}VERIFY_CHECKPOINT", str(tmp_path))
    return write


@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_rows_are_compared_with_a_checkpoints(ranks, local_checkpoint, sequences, kind):
    def forward(made):
        if kind == "decode":
            given, tokens = step("DECODE", np.arange(9), np.zeros(9, np.int64), np.arange(9))
        else:
            made_up = sequences(0, 900, longest=10)
            batch = made.manager.prepare_for_forward(scheduled(made_up), chunked_req=None)
            given, tokens = forward_of(batch, made_up)
        ids, found = made.hasher(tokens, given), []
        for at, layer in enumerate(made.layers):
            try:
                found.append(layer.embed_rows(ids[:, at], given, False))
            except (FingerprintError, PoolError) as error:
                found.append(error)
        return len(tokens), found

    for change in (0, 1):
        local_checkpoint(change)
        group = ranks(2).make()
        group.known, group.parts = None, []
        with group.at(1) as made:
            tokens, found = forward(made)
            counts = made.worker.counts
            assert counts.verified == 2 * 4 + tokens * (kind == "prefill")
            if change == 0:
                assert (counts.differences, len(group.parts)) == (0, 2)
                continue
            for layer, one in zip((1, 14), found, strict=True):
                with pytest.raises(FingerprintError, match=rf"layer {layer}: row \d+ of token \d.* local table"):
                    raise one
            assert counts.differences == 8
            assert [vote[-1] for vote in group.votes[-2:]] == [False] * 2, "it is an error of all ranks"
            assert group.parts == []
