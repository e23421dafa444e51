"""vLLM's own Qwen4 n-gram embeddings with rows from a real server, against the same ones with the tables they stock."""

import json
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from engrampool_client import DeadlineError, FingerprintError, PoolError
from engrampool_client.config import ENVIRONMENT_PREFIX
from engrampool_client.integrations import vllm as plugin
from engrampool_client.testing import serve_process
from small_model import write_model

torch = pytest.importorskip("torch", reason="PyTorch is not installed; `make test-engines` installs it")
pytest.importorskip("vllm", reason="the engines are not there; `make test-engines` unpacks them")
from qwen4_model import CONFIG, DIM, EOS, FORMS, HEADS, LAYERS, VOCABULARY, checkpoint, config_of, spec_of  # noqa: E402

MAX_TOKENS = 300


@pytest.fixture(scope="module", autouse=True)
def not_compiled():
    """The engine compiles the arithmetic of its ids, which takes a minute here."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Form of the rows -> a server of such tables; started when it is asked for."""
    running = []

    @cache
    def served(form):
        running.append(serve_process(write_model(tmp_path_factory.mktemp(form) / "model", spec_of(form))))
        return running[-1].__enter__()

    yield served
    for one in running:
        one.__exit__(None, None, None)


@pytest.fixture(scope="module")
def qwen4(engine):
    """The engine's modules, with our plugin in them, and its own classes."""
    import vllm.distributed.parallel_state as parallel_state
    import vllm.models.qwen4_exp.common.ngram_embedding as common
    import vllm.models.qwen4_exp.nvidia.ngram_embedding as nvidia

    from engrampool_client.integrations import vllm_qwen4 as ours

    assert nvidia.Qwen4ExpPLEPinnedHostEmbedding is nvidia.Qwen4ExpPLEDeviceEmbedding is ours.PooledTable
    embedding = nvidia.Qwen4ExpNGramEmbedding
    own = {name: vars(embedding)[name].__wrapped__ for name in ("__init__", "load_weights")}
    stock = type("Stock", (embedding,), {**own, "start_prefetch": ours._start_one})
    return SimpleNamespace(
        common=common,
        module=nvidia,
        parallel=parallel_state,
        ours=ours,
        worker=engine.ours,
        engine=engine,
        Stock=stock,
        Pinned=engine.Pinned,
        Device=engine.Device,
    )


def in_memory(pinned):
    """The engine's table in the host's memory, which its own synchronous way reads: there is no GPU to prefetch on."""

    class InMemory(pinned):
        supports_prefetch = False

        def allocate_embedding_weight(self, rows, dim, dtype):
            return torch.empty(rows, dim, dtype=dtype)

        def _lookup(self, ids, output=None):
            output = torch.empty(*ids.shape, DIM, dtype=self.embedding_method.lookup_dtype(self))
            memory = output
            if hasattr(self, "weight_scale_2"):  # made of pinned memory only
                self.embedding_method._uva_weight_scale = self.weight_scale
            else:  # bytes by type, too, as the interpreter does not go by the kernel's annotation
                memory = output.view(torch.uint8)
            self.embedding_method.lookup_from_pinned(self, ids.reshape(-1), memory)
            return output

        forward = pinned.sync_lookup

    return InMemory


class Ranks:
    """The n-gram embeddings of a tensor-parallel group's ranks, all of them in this process, one after the other."""

    def __init__(self, qwen4, patch, size, form, address, config=None, **settings):
        self.qwen4, self.patch, self.size, self.form = qwen4, patch, size, form
        self.made, self.known, self.parts = [], None, []
        self.config = config or config_of(form)
        self.settings = {"target": address, **settings}
        modes = qwen4.engine.ours
        self.compilation = SimpleNamespace(cudagraph_mode=modes.CUDAGraphMode.NONE, mode=modes.CompilationMode.NONE)
        self.vllm_config = SimpleNamespace(
            engram_config=SimpleNamespace(cpu_offload=True),
            compilation_config=self.compilation,
            use_v2_model_runner=True,
            parallel_config=SimpleNamespace(
                prefill_context_parallel_size=1, data_parallel_rank=0, world_size=size, rank=0
            ),
        )
        self.group = SimpleNamespace(world_size=size, rank_in_group=0, all_reduce=self._all_reduce)
        self.patch.setattr(qwen4.parallel, "_TP", self.group)
        self.patch.setattr(qwen4.parallel, "_ETP", self.group)
        for module in (qwen4.module, qwen4.ours, qwen4.worker.engram):
            patch.setattr(module, "get_current_vllm_config", lambda: self.vllm_config)
        # Ranks of one process have nobody to come to an outcome with; test_agreement.py has some.
        patch.setattr(qwen4.worker, "get_tp_group", lambda: SimpleNamespace(world_size=1))
        patch.setattr(qwen4.common, "is_uva_available", lambda: True)
        patch.setattr(
            qwen4.common, "get_accelerator_view_from_cpu_tensor", lambda tensor: tensor.data.view(torch.uint8)
        )

    @contextmanager
    def at(self, rank):
        """Within this, the process is that rank."""
        self.group.rank_in_group = rank
        self.patch.setattr(self.qwen4.worker, "_worker", self.made[rank].worker)
        yield self.made[rank]

    def embeddings(self, kind, **named):
        """As the model's layers make them."""
        return [
            kind(
                self.config,
                CONFIG["ple_embed_dim"],
                index,
                MAX_TOKENS,
                data_parallel_rank=0,
                prefix=f"model.layers.{number - 1}.ple.ple_embedding",
                params_dtype=torch.bfloat16,
                **named,
            )
            for index, number in enumerate(LAYERS)
        ]

    def make(self, **named):
        """Embeddings with pooled rows for each rank, loaded from a checkpoint that lacks the tables."""
        for name, value in self.settings.items():
            self.patch.setenv(f"{ENVIRONMENT_PREFIX}{name.upper()}", str(value))
        for rank in range(self.size):
            self.made.append(SimpleNamespace(worker=self.qwen4.worker._Worker()))
            with self.at(rank) as made:
                made.embeddings = self.embeddings(self.qwen4.module.Qwen4ExpNGramEmbedding, **named)
                for one, table in zip(made.embeddings, spec_of(self.form).tables, strict=True):
                    one.load_weights(iter(checkpoint(table, tables=False).items()))
        return self

    def stock(self, kind, **named):
        """For each rank, the engine's own, its tables of that kind loaded by its own loader from a whole checkpoint."""
        made = []
        for rank in range(self.size):
            self.group.rank_in_group = rank
            with self.patch.context() as patch:
                for name in ("Qwen4ExpPLEPinnedHostEmbedding", "Qwen4ExpPLEDeviceEmbedding"):
                    patch.setattr(self.qwen4.module, name, kind)
                made.append(self.embeddings(self.qwen4.Stock, **named))
            for one, table in zip(made[-1], spec_of(self.form).tables, strict=True):
                one.load_weights(iter(checkpoint(table).items()))
        return made

    def _all_reduce(self, values):
        """What all ranks have together, if it is known by now, and else this one's, which is kept."""
        if self.known is not None:
            return next(self.known)
        self.parts.append(values.clone())
        return values

    def run(self, embeddings, batch):
        """What each layer of one forward has in the end. embeddings: of each rank, those of all layers."""
        self.known, self.parts = None, []
        found, *_ = [self._forward(rank, layers, batch) for rank, layers in enumerate(embeddings)]
        if self.size > 1:
            assert all(part.any() for part in self.parts), "every rank has some of it"
            each = [self.parts[at :: len(LAYERS)] for at in range(len(LAYERS))]
            self.known = iter([sum(parts[1:], parts[0]) for parts in each])
            found = self._forward(0, embeddings[0], batch)
        with self.at(0):
            return [
                (rows, one.ngram_embedding.dequantize(rows, torch.bfloat16))
                for one, rows in zip(embeddings[0], found, strict=True)
            ]

    def _forward(self, rank, layers, batch):
        with self.at(rank):
            for one in layers:
                one.start_prefetch(*batch)
            return [one(torch.empty(len(batch[0]), 0), *batch) for one in layers]

    def close(self):
        for rank in range(len(self.made)):
            with self.at(rank):
                self.qwen4.worker.close()


@pytest.fixture
def ranks(qwen4, served, monkeypatch):
    """Ranks of a size; made, and closed at the end."""
    made = []

    def ranks(size, form="bfloat16", config=None, **settings):
        address = settings.pop("target", None) or served(form).address
        made.append(Ranks(qwen4, monkeypatch, size, form, address, config, **settings))
        return made[-1]

    yield ranks
    for one in made:
        one.close()


@pytest.fixture
def flags_may_be_masks(monkeypatch):
    import triton.runtime.interpreter as interpreter

    # The interpreter makes integers of flags that it has and-ed, and takes none where a mask is wanted.
    load = interpreter.InterpreterBuilder.create_masked_load

    def masked_load(self, pointers, mask, *rest):
        return load(self, pointers, interpreter.TensorHandle(mask.data.astype(bool), mask.dtype), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", masked_load)


def batch_of(made, padding=0):
    """A batch's tokens, boundaries and context as the engine's model state has them, and tokens that pad a graph."""
    for past in made.histories:
        past[::7] = EOS
    made.depth = CONFIG["ngram_size"] - 1
    tokens = np.concatenate([made.batch.tokens, np.zeros(padding, np.int32)])
    context = made.before(made.histories, EOS)[:, ::-1].astype(np.int32)
    # Beyond the requests that there are, empty ones.
    bounds = np.append(made.bounds, [made.bounds[-1]] * (padding > 0)).astype(np.int32)
    context = np.concatenate([context, np.full((int(padding > 0), made.depth), EOS, np.int32)])
    return tuple(torch.from_numpy(one) for one in (tokens, bounds, context))


def integers(rows):
    return rows.contiguous().view(torch.uint8).numpy()


def test_the_engines_loader_loads_no_row_of_a_table(ranks, qwen4):
    for form in FORMS:
        with ranks(2, form).make().at(1) as made:
            for one, table in zip(made.embeddings, spec_of(form).tables, strict=True):
                loaded = one.load_weights(iter(checkpoint(table).items()))
                assert "ngram_embedding.weight" in loaded
                assert one.ngram_embedding.weight.shape[0] == 0
                assert one.ngram_embedding.layer == table.layer
            if form == "bfloat16":
                whole = {"ngram_embedding.weight": torch.zeros(table.num_rows, DIM)}
                assert one.load_weights(iter(whole.items())) == {"ngram_embedding.weight"}
        with pytest.raises(PoolError, match="rows are in the pool"):
            one.ngram_embedding.sync_lookup(torch.zeros(3, HEADS, dtype=torch.int64))


@pytest.mark.parametrize("size", [1, 2, 4, 16])
@pytest.mark.parametrize("form", ["bfloat16", "float8_e4m3fn"])
def test_embeddings_are_what_the_stocked_tables_have(ranks, qwen4, size, form, sequences, same, same_bits):
    group = ranks(size, form).make()
    stocked = group.stock(qwen4.Device)
    for seed in range(3):
        batch = batch_of(sequences(seed, VOCABULARY, dead=False), padding=4 * (seed == 1))
        theirs, ours = group.run(stocked, batch), group.run([made.embeddings for made in group.made], batch)
        for (rows, numbers), (own, made) in zip(theirs, ours, strict=True):
            assert rows.dtype == own.dtype == getattr(torch, form)
            same("vllm", f"Qwen4ExpNGramEmbedding, {form}, TP {size}", integers(rows), integers(own))
            same_bits("vllm", f"Qwen4ExpNGramEmbedding, dequantized, {form}, TP {size}", numbers, made)


@pytest.mark.parametrize(("size", "form"), [(1, "nvfp4"), (2, "nvfp4"), (2, "bfloat16"), (1, "float8_e4m3fn")])
def test_embeddings_are_what_the_engines_kernel_reads(ranks, qwen4, size, form, sequences, same, flags_may_be_masks):
    """Of the table in the host's memory, in whose place ours is; NVFP4's numbers are made where rows are read."""
    group = ranks(size, form).make()
    stocked = group.stock(in_memory(qwen4.Pinned))
    batch = batch_of(sequences(4, VOCABULARY, dead=False, requests=4, longest=4), padding=3)
    theirs, ours = group.run(stocked, batch), group.run([made.embeddings for made in group.made], batch)
    for (rows, _), (own, _) in zip(theirs, ours, strict=True):
        assert rows.any()
        assert rows.dtype == own.dtype
        same("vllm", f"Qwen4ExpPLEPinnedHostEmbedding, {form}, TP {size}", integers(rows), integers(own))


# --- forwards that go wrong


def forward(made, batch):
    """What each layer has, or fails with, in a forward. Each starts where the one before it runs, as in the model."""
    found = []
    for one in made.embeddings:
        one.start_prefetch(*batch)
        try:
            found.append(one(torch.empty(len(batch[0]), 0), *batch).clone())
        except PoolError as error:
            found.append(error)
    return found


@pytest.fixture
def some_batch():
    return torch.arange(20, 25, dtype=torch.int32), torch.tensor([0, 3, 5]), torch.tensor([[EOS, EOS], [3, 4]])


def assert_same(found, right):
    for one, other in zip(found, right, strict=True):
        assert other.view(torch.int16).any()
        np.testing.assert_array_equal(integers(one), integers(other))


def test_layers_of_a_forward_are_one_request(ranks, some_batch):
    with ranks(1).make().at(0) as made:
        for turn in range(1, 3):
            forward(made, some_batch)
            assert made.worker.client.stats.steps.total() == turn
        assert (made.worker.counts.steps, made.worker.counts.tokens) == (2, 10)


@pytest.mark.parametrize("policy", ["mask", "raise"])
def test_a_server_that_is_silent_costs_a_forward_its_rows_and_the_next_none(ranks, served, some_batch, policy):
    with ranks(1).make().at(0) as made:
        right = forward(made, some_batch)
    with ranks(1, timeout_s=0.3, on_failure=policy, breaker_failures=0).make().at(0) as made:
        with served("bfloat16").frozen():
            found = forward(made, some_batch)
        for one in found:
            assert isinstance(one, DeadlineError) if policy == "raise" else not one.view(torch.int16).any()
        # The server was woken, and may take its time: within the test's own limit rows come again.
        again = next(found for found in iter(lambda: forward(made, some_batch), None) if all(map(has_rows, found)))
        assert_same(again, right)


def has_rows(found):
    return isinstance(found, torch.Tensor) and bool(found.view(torch.int16).any())


def test_ranks_come_to_one_outcome_in_each_layer(ranks, qwen4, some_batch, monkeypatch):
    """What another rank says of a layer's tokens holds here; test_agreement.py has ranks that are processes."""
    answers = iter([[1, 1, 0, 1, 1, 1], [1] * 5 + [0], *[[1] * 6] * 2])
    monkeypatch.setattr(qwen4.worker, "over", lambda group: lambda flags: flags & np.array(next(answers), bool))
    group = ranks(1)
    monkeypatch.setattr(qwen4.worker, "get_tp_group", lambda: SimpleNamespace(world_size=2, cpu_group=None))
    with group.make().at(0) as made:
        first, second = forward(made, some_batch)
        assert [has_rows(row) for row in first] == [True, True, False, True, True]
        assert "another rank of this group" in str(second)
        counts = made.worker.counts
        assert (counts.masked, counts.failed, counts.steps) == ({2: 1, 5: 0}, 1, 1)
        assert all(map(has_rows, forward(made, some_batch)))


def test_a_forward_that_is_left_in_the_midst_is_given_up_by_the_next(ranks, some_batch):
    other = tuple(one.flip(0) for one in some_batch[:1]) + some_batch[1:]
    with ranks(1).make().at(0) as made:
        right = forward(made, some_batch)
        made.embeddings[0].start_prefetch(*other)  # and the model fails
        for _ in range(3):
            assert_same(forward(made, some_batch), right)
        made.embeddings[0].start_prefetch(some_batch[0][:2], torch.tensor([0, 2]), some_batch[2][:1])
        with pytest.raises(PoolError, match="rows of 2 tokens were asked for, and of 5 are wanted"):
            made.embeddings[0](torch.empty(5, 0), *some_batch)


def test_dummy_forwards_ask_nobody(ranks, qwen4, some_batch):
    with ranks(1).make().at(0) as made:
        right, ran = forward(made, some_batch), []
        stats = made.worker.client.stats
        asked = stats.bytes["wire"]
        worker = SimpleNamespace(
            model_runner=SimpleNamespace(_dummy_run=lambda *_, **__: ran.append(forward(made, some_batch)), eplb=None),
            randomize_dummy_inputs=False,
            use_v2_model_runner=False,
        )
        qwen4.engine.Worker.execute_dummy_batch(worker)
        assert len(ran) == 1
        assert not any(map(has_rows, ran[0]))
        assert stats.bytes["wire"] == asked
        assert_same(forward(made, some_batch), right)


def test_pieces_of_a_graph_are_replayed_with_the_rows_of_each_forward(ranks, some_batch, monkeypatch):
    """As the engine captures: what runs between pieces is kept, and called again with the same memory, filled anew."""
    import vllm.compilation.breakable_cudagraph as breakable

    between = []

    def add_eager(run):
        between.append(run)
        return run()

    capture = SimpleNamespace(_capturing=True, add_eager=add_eager)
    with ranks(1).make().at(0) as made:
        batches = [((some_batch[0] + shift) % VOCABULARY, *some_batch[1:]) for shift in (0, 100, 200)]
        right = [forward(made, batch) for batch in batches]
        ids, outputs = [torch.zeros(5, HEADS, dtype=torch.int64) for _ in LAYERS], []
        tables = [one.ngram_embedding for one in made.embeddings]
        with monkeypatch.context() as patch, made.worker.staging.quiet():
            patch.setattr(breakable, "weak_ref_tensor", lambda tensor: tensor)  # it is compiled, and for CUDA
            patch.setattr(breakable.BreakableCUDAGraphCapture._tls, "active", capture, raising=False)
            for table, own in zip(tables, ids, strict=True):
                table.start_prefetch(own)
            outputs = [table.finalize_prefetch(5) for table in tables]
        assert len(between) == 4
        assert not any(map(has_rows, outputs))
        for batch, wanted in zip(batches, right, strict=True):
            for own, one in zip(ids, made.embeddings, strict=True):
                own.copy_(one.compute_ngram_ids(*batch))  # a piece of the graph would
            for run in between:
                run()
            assert_same(outputs, wanted)


# --- the start


@pytest.mark.parametrize("sharded", [False, True])
def test_ranks_that_reduce_by_scattering_are_left_to_it(ranks, qwen4, some_batch, sharded):
    """With sequence parallelism the embedding adds up what ranks have, not its table."""
    group = ranks(2)
    group.make(use_sequence_parallel=sharded)
    with group.at(0) as made:
        made.embeddings[0].start_prefetch(*some_batch)
        made.embeddings[0].ngram_embedding.finalize_prefetch(5)
    assert len(group.parts) == (not sharded)


def test_a_checkpoint_without_tables_is_whole_to_the_engine(ranks, qwen4):
    """By its own loader's check of what was loaded, of models with quantization and without."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.model_executor.models.utils import AutoWeightsLoader

    for form in FORMS:
        with ranks(1, form).make().at(0) as made:
            model = torch.nn.Module()
            model.layers = torch.nn.ModuleList(made.embeddings)
            weights = [
                (f"layers.{at}.{name}", tensor)
                for at, table in enumerate(spec_of(form).tables)
                for name, tensor in checkpoint(table, tables=False).items()
            ]
            loaded = AutoWeightsLoader(model).load_weights(iter(weights))
            for quantized in (form != "bfloat16", False):
                DefaultModelLoader.track_weights_loading(None, model, set(loaded), quantized=quantized)
            for one in made.embeddings:
                one.ngram_embedding.quant_method.process_weights_after_loading(one.ngram_embedding)


@pytest.mark.parametrize("missing", ["layer_multipliers", "ngram_heads_offsets"])
def test_a_checkpoint_of_other_constants_is_refused_when_it_is_loaded(ranks, missing):
    with ranks(1).make().at(0) as made:
        tensors = checkpoint(spec_of("bfloat16").tables[0], tables=False)
        tensors[missing] = tensors[missing] + 2
        with pytest.raises(FingerprintError, match=r"layer_2: (multipliers|heads begin at)"):
            made.embeddings[0].load_weights(iter(tensors.items()))


@pytest.mark.parametrize("form", ["float8_e4m3fn", "nvfp4"])
def test_a_table_of_another_scale_is_refused_when_it_is_loaded(ranks, qwen4, form, monkeypatch):
    with ranks(1, form).make().at(0) as made:
        table = made.worker.client.spec.tables[0]
        tensors = checkpoint(table, tables=False)
        for scale, refused in ((None, False), (float(np.float32(0.0321)), False), (0.5, True)):
            monkeypatch.setitem(table.__dict__, "scale", scale)
            if refused:
                with pytest.raises(FingerprintError, match=r"layer_2: the table's scale is 0\.032.* here, 0\.5 there"):
                    made.embeddings[0].load_weights(iter(tensors.items()))
            else:
                made.embeddings[0].load_weights(iter(tensors.items()))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ngram_vocab_size_base": 400}, "layer_2: rows of head 0"),
        ({"ple_layer_ids": [2, 6]}, r"layers: \[2, 6\] here, \[2, 5\] there"),
        ({"eos_token_id": 8}, "layer_2: fill 8 here, 7 there; layer_2: stop 8"),
        ({"vocab_size": 600}, "layer_2: multipliers"),
        ({"ple_embedding_dtype": "float8_e4m3fn"}, "32 bytes a row here, 64 there"),
    ],
)
def test_a_server_of_another_model_is_refused_before_the_first_lookup(ranks, change, said):
    with pytest.raises(FingerprintError, match=said):
        ranks(1, config=config_of("bfloat16", **change)).make()


def test_rows_of_another_kind_and_as_many_bytes_are_refused(ranks, served):
    group = ranks(1, "bfloat16", config=config_of("float8_e4m3fn", ple_embed_dim=1024))
    embed_dim = CONFIG["ple_embed_dim"]
    try:
        CONFIG["ple_embed_dim"] = 1024
        with pytest.raises(FingerprintError, match=r"rows of \[\('float8_e4m3fn', 64\)\] here, \[\('bfloat16', 32\)\]"):
            group.make()
    finally:
        CONFIG["ple_embed_dim"] = embed_dim


@pytest.mark.parametrize("graphs", ["FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE", "compiled"])
def test_graphs_that_run_no_python_are_refused(ranks, qwen4, graphs):
    group, modes = ranks(1), qwen4.engine.ours
    if graphs == "compiled":
        group.compilation.mode = modes.CompilationMode.VLLM_COMPILE
    else:
        group.compilation.cudagraph_mode = modes.CUDAGraphMode[graphs]
    with pytest.raises(RuntimeError, match=r'"cudagraph_mode": "PIECEWISE".*--enforce-eager'):
        group.make()
    group.made.clear()
    group.compilation.mode, group.compilation.cudagraph_mode = modes.CompilationMode.NONE, modes.CUDAGraphMode.PIECEWISE
    group.make()


def test_what_ranks_cannot_share_is_refused(ranks, qwen4, monkeypatch):
    with pytest.raises(RuntimeError, match="32 tensor-parallel ranks cannot share 16 columns"):
        ranks(32).make()
    group = ranks(1)
    monkeypatch.setattr(qwen4.parallel, "_ETP", SimpleNamespace(world_size=2, rank_in_group=0))
    with pytest.raises(RuntimeError, match="start vLLM without embedding_across_dp"):
        group.make()
    monkeypatch.setattr(qwen4.ours.current_platform, "is_rocm", lambda: True)
    with pytest.raises(RuntimeError, match="NVIDIA's GPUs only"):
        group.make()


def test_amds_code_gets_no_table_of_the_engines(qwen4):
    """It takes the names that ours stand for, and ours refuse it."""
    import vllm.models.qwen4_exp.amd.ple_layer as amd

    assert amd.Qwen4ExpPLEPinnedHostEmbedding is amd.Qwen4ExpPLEDeviceEmbedding is qwen4.ours.PooledTable


def test_another_qwen4_is_refused_by_its_functions(qwen4, monkeypatch):
    plugin.check_parameters()
    monkeypatch.setattr(qwen4.Pinned, "_reduce_etp_embeddings", lambda self, parts: None)
    with pytest.raises(RuntimeError, match=r"_reduce_etp_embeddings\(self, embeddings\) is now: self parts"):
        plugin.check_parameters()


def test_a_server_that_is_away_is_an_error_of_the_start(ranks):
    with pytest.raises(PoolError):
        ranks(1, target="127.0.0.1:1", connect_timeout_s=0.2).make()


def test_an_index_that_does_not_name_the_tables_needs_no_files_of_them(tmp_path):
    """What docs/INTEGRATION_VLLM.md tells to do, by the engine's own function."""
    from vllm.model_executor.model_loader.weight_utils import filter_duplicate_safetensors_files

    page = (Path(__file__).parents[2] / "docs/INTEGRATION_VLLM.md").read_text(encoding="utf-8")
    script = page.partition("## Qwen4")[2].partition("```python\n")[2].partition("```")[0]
    place = "model.language_model.layers.1.ple.ple_embedding"
    for form in FORMS:
        index, table = tmp_path / "model.safetensors.index.json", spec_of(form).tables[0]
        kept = {f"{place}.{name}": "a.safetensors" for name in checkpoint(table, tables=False)}
        tables = {f"{place}.{name}": "tables.safetensors" for name in checkpoint(table)}
        index.write_text(json.dumps({"weight_map": {**tables, **kept}}))
        there = [str(tmp_path / "a.safetensors")]
        with pytest.raises(FileNotFoundError, match="tables"):
            filter_duplicate_safetensors_files(there, str(tmp_path), index.name)
        exec(script.replace("/models/Qwen4/model.safetensors.index.json", str(index)), {})
        assert json.loads(index.read_text())["weight_map"] == kept
        assert filter_duplicate_safetensors_files(there, str(tmp_path), index.name) == there
