"""vLLM's own Engram layers with rows from a real server, against the same layers with the table that they stock."""

import json
import socket
import urllib.request
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from engrampool_client import Client, DeadlineError, FingerprintError, PoolError
from engrampool_client.integrations import vllm as plugin
from engrampool_client.integrations.forwards.settings import ENGINE_PREFIX
from engrampool_proto.synthetic import synthetic_rows

torch = pytest.importorskip("torch", reason="PyTorch is not installed; `make test-engines` installs it")
pytest.importorskip("vllm", reason="the engines are not there; `make test-engines` unpacks them")
from vllm_ranks import MAX_TOKENS, bits, hashed, load, stock_layers  # noqa: E402  (needs torch)


@pytest.mark.parametrize("size", [1, 2, 4, 5, 8])
def test_layers_read_what_they_read_of_the_stocked_table(ranks, size, spec, sequences, same):
    group = ranks(size).make()
    state = group.made[0].state
    stocked = stock_layers(group, state.layout, spec)
    for seed in range(3):
        ids = hashed(state, sequences(seed, spec.vocab_size, longest=(3, 8, 16)[seed]))
        if seed % 2:  # tokens without rows, as idle data-parallel ranks have, and one without some of them
            ids[::3] = -1
            ids[-1, 1, 5] = -1
        if seed == 2:
            ids[:, 0] = -1  # a layer without any
        for rank in range(size):
            with group.at(rank) as made:
                for at, layer in enumerate(made.layers):
                    layer.prepare_embeddings(ids[:, at])
                    stocked[rank][at].prepare_embeddings(ids[:, at])
        for at in range(len(spec.tables)):
            theirs, read = group.embed([layers[at] for layers in stocked], ids[:, at])
            ours, got = group.embed([made.layers[at] for made in group.made], ids[:, at])
            for rank in range(size):
                same("vllm", f"Engram.staged_rows, TP {size}", bits(theirs[rank]), bits(ours[rank]))
            same("vllm", f"Engram.embed, TP {size}", bits(read), bits(got))
            assert got.shape == (len(ids), 24, 256)


def test_a_chunk_of_a_prompt_is_read_as_its_rows_are(ranks, spec, same):
    """Of more tokens than go in a small step, against the rows' own numbers: the engine's kernel takes long here."""
    group = ranks(2).make()
    ids = np.random.default_rng(5).integers(0, spec.tables[0].num_rows, (MAX_TOKENS, 2, 24)).astype(np.int32)
    for rank in range(2):
        with group.at(rank) as made:
            for at, layer in enumerate(made.layers):
                layer.prepare_embeddings(torch.from_numpy(ids[:, at]))
            for at, table in enumerate(spec.tables):
                columns = ids[:, at, 12 * rank : 12 * rank + 12].astype(np.uint64)
                rows = torch.from_numpy(synthetic_rows(table, columns.reshape(-1)))
                values = rows[:, :256].view(torch.float8_e4m3fn).double().unflatten(-1, (8, 32))
                exact = (values * torch.exp2(rows[:, 256:].double() - 127).unsqueeze(-1)).bfloat16()
                read = made.layers[at]._ready_rows(MAX_TOKENS)
                same("vllm", "Engram.staged_rows, a chunk", bits(exact), bits(read).reshape(-1, 8, 32))


def test_the_engines_loader_loads_nothing_of_a_checkpoints_table(ranks, spec):
    with ranks(4).make().at(3) as made:
        table = made.layers[1].embed_tokens
        load(table, spec.tables[1])
        assert (table.weight.shape, table.weight_scale_inv.shape) == ((0, 256), (0, 8))
        assert (table.head_start, table.part_n_hash_cols, table.dp_size, table.cpu_offload) == (18, 6, 1, False)
        with pytest.raises(PoolError, match="rows are in the pool"):
            table(torch.zeros(3, 24, dtype=torch.int32))


# --- forwards that go wrong


def forward(made, ids):
    """What each layer reads, or fails with, in a forward."""
    for at, layer in enumerate(made.layers):
        layer.prepare_embeddings(ids[:, at])
    found = []
    for layer in made.layers:
        try:
            found.append(layer._ready_rows(len(ids)).clone())
        except PoolError as error:
            found.append(error)
    return found


@pytest.fixture
def some_ids(spec):
    return torch.from_numpy(np.arange(5 * 2 * 24, dtype=np.int32).reshape(5, 2, 24))


@pytest.mark.parametrize("policy", ["mask", "raise"])
@pytest.mark.parametrize(
    "tokens", [5, 150]
)  # a small step, which the engine's thread receives, and one that it does not
def test_a_server_that_is_silent_costs_a_forward_its_rows_and_the_next_none(ranks, spec, server, policy, tokens):
    ids = torch.from_numpy(np.arange(tokens * 2 * 24, dtype=np.int32).reshape(tokens, 2, 24) % spec.tables[0].num_rows)
    with ranks(1).make().at(0) as made:
        right = forward(made, ids)
    with ranks(1, timeout_s=0.3, on_failure=policy, breaker_failures=0).make().at(0) as made:
        with server.frozen():
            found = forward(made, ids)
            kept = [layer.staged_rows.clone() for layer in made.layers]
        for one in found:
            if policy == "mask":
                assert not one.view(torch.int16).any()
            else:
                assert isinstance(one, DeadlineError)
        # Whatever comes late by now, what was read stays as it was, until there is a forward whose rows come.
        for layer, one in zip(made.layers, kept, strict=True):
            np.testing.assert_array_equal(bits(layer.staged_rows), bits(one))
        again = next(found for found in iter(lambda: forward(made, ids), None) if not_missing(found))
        for one, other in zip(again, right, strict=True):
            np.testing.assert_array_equal(bits(one), bits(other))


def not_missing(found):
    """Whether rows came, within the test's own limit: the server was woken, and may take its time."""
    return all(isinstance(one, torch.Tensor) and one.view(torch.int16).any() for one in found)


def test_a_forward_that_is_left_in_the_midst_is_given_up_by_the_next(ranks, some_ids):
    with ranks(1).make().at(0) as made:
        right = forward(made, some_ids)
        made.layers[0].prepare_embeddings(some_ids[:, 1])  # and the model fails
        for _ in range(3):
            for one, other in zip(forward(made, some_ids), right, strict=True):
                np.testing.assert_array_equal(bits(one), bits(other))
        for layer in made.layers:
            layer.prepare_embeddings(some_ids[:2, 0])
        with pytest.raises(PoolError, match="rows of 2 tokens were asked for, and of 5 are wanted"):
            made.layers[0]._ready_rows(5)


def test_a_layer_whose_ids_were_not_given_gets_no_rows_of_another_forward(ranks, some_ids):
    with ranks(1).make().at(0) as made:
        with pytest.raises(PoolError, match="no row ids of layer 14 were given"):
            made.layers[1]._ready_rows(5)
        made.layers[0].prepare_embeddings(some_ids[:, 0])
        with pytest.raises(PoolError, match="no row ids of layer 14 were given"):
            made.layers[1]._ready_rows(5)
        assert made.layers[0]._ready_rows(5).view(torch.int16).any()


def test_ids_beyond_the_table_are_an_error_of_the_layer(ranks, some_ids):
    with ranks(1, on_failure="mask").make().at(0) as made:
        some_ids[2, 0, 3] = 1 << 30
        for at, layer in enumerate(made.layers):
            layer.prepare_embeddings(some_ids[:, at])
        with pytest.raises(Exception, match="row id 1073741824 at position 51 of layer 1"):
            made.layers[0]._ready_rows(5)


@pytest.mark.parametrize("method", ["determine_available_memory", "compile_or_warm_up_model", "execute_dummy_batch"])
def test_warming_up_profiling_and_capturing_ask_nobody(ranks, engine, some_ids, monkeypatch, method):
    with ranks(1).make().at(0) as made:
        forward(made, some_ids)
        stats, ran = made.worker.client.stats, []

        def run(*_, **__):
            ran.append(forward(made, some_ids))

        runner = SimpleNamespace(_dummy_run=run, eplb=None)
        worker = SimpleNamespace(
            model_runner=runner, randomize_dummy_inputs=False, use_v2_model_runner=False, _compile_or_warm_up_model=run
        )
        if method == "determine_available_memory":  # what its own body does is the engine's; the first thing is this
            import vllm.v1.worker.gpu_worker as gpu_worker

            def first(_):
                run()
                raise KeyboardInterrupt

            monkeypatch.setattr(gpu_worker, "maybe_apply_startup_plan", first)
            with pytest.raises(KeyboardInterrupt):
                getattr(engine.Worker, method)(worker)
        else:
            getattr(engine.Worker, method)(worker)
        assert [one.view(torch.int16).any().item() for one in ran[0]] == [False, False]
        asked = stats.bytes["wire"]
        assert all(one.view(torch.int16).any() for one in forward(made, some_ids))
        assert stats.bytes["wire"] == 2 * asked, "only the forwards before and after were asked for"


def test_pieces_of_a_graph_are_replayed_with_the_rows_of_each_forward(ranks, some_ids, monkeypatch):
    """As the engine captures: what runs between pieces is kept, and called again with the same memory, filled anew."""
    import vllm.compilation.breakable_cudagraph as breakable

    between = []

    def add_eager(run):
        between.append(run)
        return run()

    capture = SimpleNamespace(_capturing=True, add_eager=add_eager)
    with ranks(1).make().at(0) as made:
        right = [forward(made, (some_ids + shift) % 1000) for shift in (0, 300, 600)]
        before, lasting = made.worker.client.stats.bytes["wire"], torch.zeros_like(some_ids)
        with monkeypatch.context() as patch, made.worker.staging.quiet():
            patch.setattr(breakable, "weak_ref_tensor", lambda tensor: tensor)  # it is compiled, and for CUDA
            patch.setattr(breakable.BreakableCUDAGraphCapture._tls, "active", capture, raising=False)
            captured = forward(made, lasting)
        assert len(between) == 4
        assert not any(one.view(torch.int16).any() for one in captured)
        assert made.worker.client.stats.bytes["wire"] == before, "a capture asks nobody"
        for shift, wanted in zip((0, 300, 600), right, strict=True):
            lasting.copy_((some_ids + shift) % 1000)
            for run in between:
                run()
            for layer, one in zip(made.layers, wanted, strict=True):
                np.testing.assert_array_equal(bits(layer.staged_rows[: len(lasting)]), bits(one))


# --- refusals


def test_another_vllm_is_refused_by_its_version_and_by_its_functions(monkeypatch):
    plugin.check_version(metadata.version("vllm"))
    plugin.check_version(f"{plugin.VERSION}+cu130")
    with pytest.raises(RuntimeError, match=r"of vLLM 0\.33\.0, and this is vLLM 0\.34\.0: install vllm==0\.33\.0 or"):
        plugin.check_version("0.34.0")
    plugin.check_parameters()
    import vllm.models.deepseek_v41.common.engram as engram

    monkeypatch.setattr(engram.Engram, "embed", lambda self, ids, rows: None)
    monkeypatch.delattr(engram.Engram, "forward")
    with pytest.raises(
        RuntimeError, match=r"Engram\.embed\(self, hash_ids\) is now: self ids rows\. Install an unchang"
    ):
        plugin.check_parameters()
    with pytest.raises(RuntimeError, match=r"vllm\.nowhere"):
        plugin.check_parameters({"vllm.nowhere:f": "self"})


@pytest.mark.parametrize(
    ("graphs", "mode"), [("FULL", "NONE"), ("FULL_AND_PIECEWISE", "NONE"), ("PIECEWISE", "VLLM_COMPILE")]
)
def test_graphs_that_run_no_python_are_refused(ranks, engine, graphs, mode):
    group = ranks(1)
    group.compilation.cudagraph_mode = engine.ours.CUDAGraphMode[graphs]
    group.compilation.mode = engine.ours.CompilationMode[mode]
    with pytest.raises(RuntimeError, match=r'"cudagraph_mode": "PIECEWISE"'):
        group.make()
    group.compilation.cudagraph_mode = engine.ours.CUDAGraphMode.PIECEWISE
    group.compilation.mode = engine.ours.CompilationMode.NONE
    group.made.clear()
    group.make()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"engram_vocab_size": 1100}, "layer_1: rows of head 0"),
        ({"engram_layer_ids": [1, 15]}, r"layers: \[1, 15\] here, \[1, 14\] there"),
        ({"engram_pad_token_id": 3}, "layer_1: fill"),
    ],
)
def test_a_server_of_another_model_is_refused_before_the_first_lookup(ranks, config, change, said):
    group = ranks(1)
    group._config = SimpleNamespace(**{**vars(config), "engram_num_embeddings": [40_000, 40_000], **change})
    with pytest.raises(FingerprintError, match=said):
        group.make()


def test_a_server_that_is_away_is_an_error_of_the_start(ranks):
    with pytest.raises(PoolError):
        ranks(1, target="127.0.0.1:1", connect_timeout_s=0.2).make()


def test_the_worker_closes_the_client_at_its_end(ranks, engine):
    with ranks(1).make().at(0) as made:
        client = made.worker.client
        assert isinstance(client, Client)
        worker = SimpleNamespace(profiler=None, elastic_ep_executor=SimpleNamespace(shutdown=lambda: 1 / 0))
        with pytest.raises(ZeroDivisionError):
            engine.Worker.shutdown(worker)
        assert client.status()["why_unusable"] == "the client is closed"
        assert engine.ours._worker.client is None


def test_an_index_that_does_not_name_the_tables_needs_no_files_of_them(tmp_path):
    """What docs/INTEGRATION_VLLM.md tells to do, by the engine's own function."""
    from vllm.model_executor.model_loader.weight_utils import filter_duplicate_safetensors_files

    page = (Path(__file__).parents[2] / "docs/INTEGRATION_VLLM.md").read_text(encoding="utf-8")
    index, names = tmp_path / "model.safetensors.index.json", {"layers.1.engram.wkv.weight": "a.safetensors"}
    tables = dict.fromkeys(["layers.1.engram.embed.weight", "layers.1.engram.embed.scale"], "tables.safetensors")
    index.write_text(json.dumps({"weight_map": {**names, **tables}}))
    there = [str(tmp_path / "a.safetensors")]
    with pytest.raises(FileNotFoundError, match="tables"):
        filter_duplicate_safetensors_files(there, str(tmp_path), index.name)
    script = page.partition("```python\n")[2].partition("```")[0]
    exec(script.replace("/models/DeepSeek-V4.1/model.safetensors.index.json", str(index)))
    for files in (there, [*there, str(tmp_path / "tables.safetensors")]):
        assert filter_duplicate_safetensors_files(files, str(tmp_path), index.name) == there


def test_ranks_come_to_one_outcome_in_each_layer(ranks, engine, some_ids, monkeypatch):
    """What another rank says of a layer's tokens holds here; test_agreement.py has ranks that are processes."""
    answers, asked = iter([[1, 1, 0, 1, 1, 1], [1] * 5 + [0], *[[1] * 6] * 3]), []

    def agree(flags):
        asked.append(flags.copy())
        return flags & np.array(next(answers), bool)

    monkeypatch.setattr(engine.ours, "over", lambda group: agree)
    group = ranks(1)
    monkeypatch.setattr(engine.ours, "get_tp_group", lambda: SimpleNamespace(world_size=2, cpu_group=None))
    with group.make().at(0) as made:
        first, second = forward(made, some_ids)
        assert [bool(row.view(torch.int16).any()) for row in first] == [True, True, False, True, True]
        assert isinstance(second, PoolError)
        assert "another rank of this group" in str(second)
        counts = made.worker.counts
        assert (counts.masked, counts.failed, counts.steps, counts.tokens) == ({1: 1, 14: 0}, 1, 1, 5)
        assert all(one.view(torch.int16).any() for one in forward(made, some_ids))
        some_ids[2, 1, 3] = 1 << 30
        for at, layer in enumerate(made.layers):
            layer.prepare_embeddings(some_ids[:, at])
        with pytest.raises(Exception, match="row id 1073741824"):
            made.layers[1]._ready_rows(5)
        assert asked[-1].tolist() == [False] * 6, "the others are told"
        assert sum(made.worker.counts.waits[1].counts) == 2


def test_a_worker_answers_prometheus_on_a_port_of_its_own(ranks, some_ids, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = ranks(1)
    group.vllm_config.parallel_config.rank = 1
    monkeypatch.setenv(f"{ENGINE_PREFIX}METRICS_PORT", str(port - 1))
    with group.make().at(0) as made:
        forward(made, some_ids)
        found = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60).read().decode()
        assert f'engrampool_engine_tokens_total{{model="{made.worker.client.spec.name}"}} 5.0' in found
        assert "engrampool_client_steps_total" in found
    group.close()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60)
