"""SGLang's own Qwen4 layers with n-grams, with rows from a real server, against the same with the tables they stock."""

import copy
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest

from engrampool_client import DeadlineError, FingerprintError, PoolError
from engrampool_client.config import ENVIRONMENT_PREFIX
from engrampool_client.integrations import sglang as plugin
from engrampool_client.testing import serve_process
from small_model import write_model

torch = pytest.importorskip("torch", reason="PyTorch is not installed; `make test-engines` installs it")
pytest.importorskip("sglang", reason="the engines are not there; `make test-engines` unpacks them")
from qwen4_model import CONFIG, DIM, EOS, HEADS, LAYERS, SCALE, VOCABULARY, checkpoint, config_of, spec_of  # noqa: E402
from sglang_ranks import with_plugin  # noqa: E402

SLOTS, HIDDEN, STREAMS, DEPTH = 16, 16, 2, CONFIG["ngram_size"] - 1
PLACE = "model.language_model.layers.{}.ple.ple_embedding.{}"


@pytest.fixture(scope="module", autouse=True)
def not_compiled():
    """The engine compiles the arithmetic of its ids, which takes long here."""
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
def engine(served):
    from sglang.srt.models import qwen4_exp

    pinned, start = qwen4_exp.Qwen4ExpPinnedHostEmbedding, qwen4_exp.Qwen4ExpPLELayer.start_prefetch
    with with_plugin(served("bfloat16")) as engine:
        from engrampool_client.integrations import sglang_qwen4

        assert qwen4_exp.Qwen4ExpPinnedHostEmbedding is sglang_qwen4.PooledTable
        engine.model, engine.qwen4, engine.Pinned = qwen4_exp, sglang_qwen4, pinned
        engine.start_prefetch = start
        yield engine


class Pool:
    """What the engine keeps of requests, by their slots: newest tokens, and windows of the layers' convolutions."""

    size, ple_window_cache = SLOTS, None

    def __init__(self):
        self.tokens = torch.full((SLOTS, DEPTH), EOS)
        self.windows = {at - 1: torch.zeros(SLOTS, HIDDEN * STREAMS, 9, dtype=torch.bfloat16) for at in LAYERS}
        self.get_mamba_indices = lambda slots: slots
        self.short_conv_layer_cache = self.windows.__getitem__
        self.short_conv_layer_intermediate_cache = lambda layer: None

    def get_ngram_context(self, slots):
        return self.tokens[slots]

    def set_ngram_context(self, slots, context):
        self.tokens[slots] = context.long()

    def set_ngram_intermediate_context(self, contexts, slots):
        """What a verification leaves is taken over later, as far as drafts are accepted; not here."""


def layer_of(engine, ple):
    """A decoder layer that has its n-grams, and nothing else."""

    class Layer(torch.nn.Module):
        add = engine.model.Qwen4ExpLayerExtensionMixin._add_ple_embedding
        attn_hyper_connection = SimpleNamespace(hc_norm=None)

        @contextmanager
        def hc_norms(self, *_):
            yield SimpleNamespace(output=None)

        def forward(self, positions, hidden_states, forward_batch, ple_batch, **_):
            if self.ple is None:
                return hidden_states * 1.5
            self._ple_forward_batch, self._ple_batch = forward_batch, ple_batch
            return self.add(hidden_states)

    layer = Layer()
    layer.ple = ple
    return layer


class Ranks:
    """The models of a tensor-parallel group's ranks, all of them in this process, one after the other."""

    def __init__(self, engine, patch, size, form, address, config=None, **settings):
        self.engine, self.patch, self.size, self.form = engine, patch, size, form
        self.made, self.known, self.parts = [], None, []
        self._env = {"target": address, **settings}
        self.config = config_of(
            form, hidden_size=HIDDEN, hc_count=STREAMS, ple_conv_kernel_size=4, rms_norm_eps=1e-6, hc_lowrank=4,
            num_hidden_layers=max(LAYERS), ple_offload_embedding=True, **(config or {}),
        )  # fmt: skip
        self.settings = SimpleNamespace(
            speculative_algorithm=None,
            overlap=SimpleNamespace(enable_two_batch_overlap=False),
            enable_pdmux=False,
            capture=SimpleNamespace(enable_torch_compile=False),
        )
        self.backends = {"decode": "breakable", "prefill": "breakable"}
        self.parallel = SimpleNamespace(
            tp_size=size, attn_tp_size=size, attn_cp_size=1, attn_dp_size=1, attn_dp_enabled=False, dp_rank=None,
            pp_size=1, launch_world_size=size, attn_tp_group=SimpleNamespace(cpu_group="processors"),
            enable_cp_tp_group_sharing=False, tp_group=None, tp_rank=0,
        )  # fmt: skip
        self.votes, self.others, model, ours = [], None, engine.model, engine.ours
        import sglang.srt.layers.vocab_parallel_embedding as embedding

        for place in (embedding, model, engine.qwen4, ours):
            patch.setattr(place, "get_parallel", lambda: self.parallel)
        for name in ("get_spec", "get_exec", "get_disagg", "get_flags"):
            patch.setattr(ours, name, lambda: self.settings)
        patch.setattr(ours, "check_cuda_graph_backend", lambda phase, backend: self.backends[phase] == backend)
        patch.setattr(ours, "over", {"processors": self._agree}.__getitem__)
        patch.setattr(embedding, "_resolve_linear_group", lambda name: None)
        patch.setattr(model, "is_dp_attention_enabled", lambda: False)
        for place in (embedding, model):
            patch.setattr(place, "tensor_model_parallel_all_reduce", self._all_reduce)
        patch.setattr(model, "use_symmetric_memory", lambda *_, **__: torch.no_grad())
        patch.setattr(model, "is_allocation_symmetric", lambda: False)
        patch.setattr(model, "get_attn_tp_context", lambda: SimpleNamespace(input_scattered=False))
        patch.setattr(model, "get_req_to_token_pool", lambda: self.pool)
        patch.setattr(model, "get_tc_piecewise_forward_context", lambda: SimpleNamespace(forward_batch=self.batch))
        patch.setattr(model.residual_batch, "to_pp", lambda hidden_states, forward_batch: hidden_states)
        patch.setattr(model.Qwen3_5ForCausalLM, "__init__", lambda model, config, *_: self._make_layers(model, config))
        # There are no streams here, nor memory that a GPU reads.
        patch.setattr(torch.cuda, "Stream", object)
        patch.setattr(model, "allocate_ple_host_table", lambda shape, dtype, **_: torch.empty(shape, dtype=dtype))

    @contextmanager
    def at(self, rank):
        """Within this, the process is that rank."""
        self.parallel.tp_rank = self.parallel.attn_tp_rank = self.parallel.launch_world_rank = rank
        self.patch.setattr(self.engine.ours, "_worker", self.made[rank].worker)
        yield self.made[rank]

    def _make_layers(self, model, config):
        """In the place of what the engine builds beside n-grams."""
        torch.nn.Module.__init__(model)
        numbers = sorted(config.ple_layer_ids)
        layers = []
        for number in range(1, config.num_hidden_layers + 1):
            ple = None
            if number in numbers:
                ple = self.engine.model.Qwen4ExpPLELayer(
                    config, layer_id=number - 1, ple_layer_index=numbers.index(number)
                )
                ple.ple_embedding.register_forward_hook(lambda *call: self.seen.append(call[-1]))
                random = torch.Generator().manual_seed(number)
                for name, weight in ple.named_parameters():
                    if "ngram_embedding" not in name:
                        weight.data = torch.randn(weight.shape, generator=random).bfloat16() / 8
            layers.append(layer_of(self.engine, ple))
        model.layers, model._start_layer, model._end_layer = torch.nn.ModuleList(layers), 0, len(layers)
        model.pp_group = SimpleNamespace(is_first_rank=True, is_last_rank=False)

    def model(self):
        """As the model's class makes it, and what its loader of weights asks of the model around it."""
        with self.patch.context() as patch:
            patch.setattr(self.engine.model, "Qwen3_5GatedDeltaNet", ())
            model = self.engine.model.Qwen4ExpModel(self.config)
        whole = self.engine.model.Qwen4ExpForConditionalGeneration.__new__(
            self.engine.model.Qwen4ExpForConditionalGeneration
        )
        torch.nn.Module.__init__(whole)
        whole.model, whole.language_model_only, whole.pp_group = model, True, model.pp_group
        whole.config = SimpleNamespace(
            tie_word_embeddings=False, num_experts=None, encoder_only=False, split_ngram_parts=4
        )
        return whole

    def make(self):
        """Models with pooled rows for each rank, loaded by the engine's loader from a checkpoint without tables."""
        for name, value in self._env.items():
            self.patch.setenv(f"{ENVIRONMENT_PREFIX}{name.upper()}", str(value))
        pool = Pool()  # each rank has the same
        for rank in range(self.size):
            self.made.append(SimpleNamespace(worker=self.engine.ours._Worker()))
            with self.at(rank) as made:
                made.model, made.pool = self.model(), pool
                made.loaded = made.model.load_weights(weights(self.form, tables=False))
        return self

    def stock(self, offload=False):
        """For each rank, the engine's own model, loaded by its own loader from a whole checkpoint."""
        made, model, pool = [], self.engine.model, Pool()
        for rank in range(self.size):
            self.parallel.tp_rank = self.parallel.attn_tp_rank = rank
            with self.patch.context() as patch:
                patch.setattr(model, "Qwen4ExpPinnedHostEmbedding", self.engine.Pinned)
                for place in (model.Qwen4ExpNGramEmbedding, model.Qwen4ExpModel):
                    patch.setattr(place, "__init__", place.__init__.__wrapped__)
                patch.setattr(self.config, "ple_offload_embedding", offload)
                load = model.Qwen4ExpForConditionalGeneration.load_weights.__wrapped__
                made.append(SimpleNamespace(model=self.model(), pool=pool, worker=self.engine.ours._Worker()))
                load(made[-1].model, weights(self.form))
        return made

    def _all_reduce(self, values):
        """What all ranks have together, if it is known by now, and else this one's, which is kept."""
        if self.known is not None:
            return next(self.known)
        self.parts.append(values.clone())
        return values

    def _agree(self, flags):
        """What all ranks say of a layer's tokens. others: what the other ones said, in their turn, before."""
        self.votes.append(flags.copy())
        return flags if self.others is None else flags & next(self.others)

    def run(self, models, batch):
        """What embeddings have of all ranks' rows, and what the model makes of it. models: of each rank."""
        self.known, self.parts = None, []
        if self.size > 1:
            for rank, own in enumerate(models):
                before = copy.deepcopy((own.pool.tokens, own.pool.windows))
                self.forward(rank, own, batch)
                own.pool.tokens[:] = before[0]
                for layer, window in before[1].items():
                    own.pool.windows[layer][:] = window
            each = [self.parts[at :: len(LAYERS)] for at in range(len(LAYERS))]
            assert all(part.any() for part in self.parts), "every rank has some of it"
            self.known = iter([sum(parts[1:], parts[0]) for parts in each])
        made = self.forward(0, models[0], batch)
        return self.seen, made

    def forward(self, rank, own, batch):
        self.parallel.tp_rank = self.parallel.attn_tp_rank = self.parallel.launch_world_rank = rank
        self.patch.setattr(self.engine.ours, "_worker", own.worker)
        self.pool, self.batch, self.seen = own.pool, batch, []
        tokens = batch.input_ids
        hidden = torch.randn(len(tokens), HIDDEN * STREAMS, generator=torch.Generator().manual_seed(3)).bfloat16()
        with torch.no_grad():
            return own.model.model(tokens, torch.zeros_like(tokens), batch, inputs_embeds=hidden)

    def close(self):
        for made in self.made:
            made.worker.close()


def weights(form, tables=True):
    """A checkpoint's tensors, as the engine names them where it reads them."""
    for table in spec_of(form).tables:
        for name, tensor in checkpoint(table, tables).items():
            yield PLACE.format(table.layer - 1, name), tensor.bfloat16() if name.endswith("weight_scale") else tensor


@pytest.fixture
def ranks(engine, served, monkeypatch):
    """Ranks of a size; made, and closed at the end."""
    made = []

    def ranks(size, form="bfloat16", config=None, **settings):
        address = settings.pop("target", None) or served(form).address
        made.append(Ranks(engine, monkeypatch, size, form, address, config, **settings))
        return made[-1]

    yield ranks
    for one in made:
        one.close()


def batch_of(mode, tokens, lengths, slots, locations=None, width=None):
    """A forward's batch, as layers read it. lengths: of each request's chunk."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    return SimpleNamespace(
        forward_mode=ForwardMode[mode],
        _original_forward_mode=None,
        input_ids=torch.as_tensor(tokens),
        extend_seq_lens=torch.as_tensor(lengths),
        extend_seq_lens_cpu=list(lengths),
        req_pool_indices=torch.as_tensor(slots),
        out_cache_loc=None if locations is None else torch.as_tensor(locations),
        global_num_token_non_padded_cpu=None if mode == "EXTEND" else len(tokens),
        spec_info=None if width is None else SimpleNamespace(draft_token_num=width, topk=1),
        tbo_parent_token_range=None,
        spec_algorithm=None,
        mamba_track_indices=None,
        mamba_track_mask=None,
        mm_input_embeds=None,
    )


def extend(random, slots):
    """Chunks of prompts that go on where their slots are, with ends of texts in them."""
    lengths = [int(random.integers(1, 9)) for _ in slots]
    tokens = random.integers(0, VOCABULARY, sum(lengths))
    tokens[random.random(len(tokens)) < 0.15] = EOS
    return batch_of("EXTEND", tokens, lengths, slots)


def decode(random, slots, padding=0):
    """One token of each request, in a graph that is for more requests than there are."""
    tokens = random.integers(0, VOCABULARY, len(slots) + padding)
    return batch_of("DECODE", tokens, [1] * len(tokens), [*slots, *[0] * padding], [1] * len(slots) + [0] * padding)


def verify(random, slots, width=4):
    tokens = random.integers(0, VOCABULARY, len(slots) * width)
    return batch_of("TARGET_VERIFY", tokens, [width] * len(slots), slots, [1] * len(tokens), width)


@pytest.mark.parametrize("form", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_models_layers_have_what_they_have_of_stocked_tables(ranks, size, form, same_bits):
    group = ranks(size, form).make()
    stocked, random = group.stock(), np.random.default_rng(size)
    slots = [1, 2, 3, 4, 5]
    for what, batch, real in [
        ("prefill", extend(random, slots), None),
        ("prefill", extend(random, slots[:3]), None),
        *[("decode", decode(random, slots, padding), len(slots)) for padding in (0, 2)],
        ("verify", verify(random, slots), None),
        ("prefill", extend(random, [6, 1]), None),
    ]:
        theirs, right = group.run(stocked, batch)
        ours, made = group.run(group.made, batch)
        for one, other in zip(theirs, ours, strict=True):
            same_bits("sglang", f"Qwen4ExpNGramEmbedding, {what}, {form}, TP {size}", one[:real], other[:real])
        same_bits("sglang", f"Qwen4ExpPLELayer, {what}, {form}, TP {size}", right[:real], made[:real])
        assert made.any()
        np.testing.assert_array_equal(stocked[0].pool.tokens[1:], group.made[0].pool.tokens[1:])


@pytest.mark.parametrize(("size", "form"), [(1, "bfloat16"), (2, "float8_e4m3fn")])
def test_embeddings_are_what_the_engines_kernel_reads(ranks, size, form, same_bits):
    """Of the table in the host's memory, in whose place ours is."""
    group, random = ranks(size, form).make(), np.random.default_rng(0)
    stocked, batch = group.stock(offload=True), extend(random, [3, 4])
    (theirs, _), (ours, _) = group.run(stocked, batch), group.run(group.made, batch)
    for one, other in zip(theirs, ours, strict=True):
        assert one.any()
        same_bits("sglang", f"Qwen4ExpPinnedHostEmbedding, {form}, TP {size}", one, other)


# --- graphs


def read(group, batch):
    """What a forward reads of each table, and the row ids that it asks for; an error where it ends by one."""
    made, outputs, given = group.made[0], [], []
    start = group.engine.qwen4._start

    def spy(ids):
        given.append(ids)
        start(ids)

    spy.run_eager = start.run_eager
    handles = [
        table.register_forward_hook(lambda *call: outputs.append(call[-1]))
        for table in (one.ngram_embedding for one in made.worker.embeddings)
    ]
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(group.engine.qwen4, "_start", spy)
            group.known = None
            group.forward(0, made, batch)
    except PoolError as error:
        return error, given
    finally:
        for handle in handles:
            handle.remove()
    return outputs, given


def assert_equal(found, right):
    assert len(found) == len(right) == len(LAYERS)
    for one, other in zip(found, right, strict=True):
        assert other.any()
        assert torch.equal(one.view(torch.int16), other.view(torch.int16))


def test_pieces_of_a_decode_graph_are_replayed_with_the_rows_of_each_forward(ranks, engine, capture):
    random, slots = np.random.default_rng(0), [1, 2, 3]
    group = ranks(1).make()
    right = [read(group, decode(random, slots, padding=2)) for _ in range(3)]
    for outputs, (ids,) in right:
        assert (ids[3:] == -1).all(), "what pads a graph asks for nothing"
        assert not any(one[3:].any() for one in outputs)
    stats = group.made[0].worker.client.stats
    before = stats.bytes["wire"]
    with capture() as between:
        found, (captured,) = engine.ours._quietly(read, group, decode(random, slots, padding=2))
    assert len(between) == 1 + len(LAYERS)
    assert not any(one.any() for one in found)
    assert stats.bytes["wire"] == before, "a capture asks nobody"
    for outputs, (ids,) in right:
        captured.copy_(ids)  # as a replayed piece has them hashed
        for run in between:
            run()
        assert_equal(found, outputs)


def test_pieces_of_a_prefills_graph_take_the_rows_of_the_batch_that_runs(ranks, engine, capture):
    """The breaks are the engine's own: where it prepares the batch, and where a layer adds its n-grams."""
    group, batches = ranks(1).make(), []
    pool = group.made[0].pool
    for seed in range(3):
        batches.append(extend(np.random.default_rng(seed), [1, 2]))
        pool.tokens[:] = EOS
        batches[-1].right, _ = read(group, batches[-1])
    stats = group.made[0].worker.client.stats
    before, wide = stats.bytes["wire"], 40
    captured = batch_of("EXTEND", np.zeros(wide, np.int64), [wide], [3])
    with capture() as between:
        engine.ours._quietly(read, group, captured)
    assert len(between) == 2 + 2 * len(LAYERS), "prepared, started, read and committed, by the engine's own breaks"
    assert stats.bytes["wire"] == before
    for batch in batches:
        tokens = len(batch.input_ids)
        captured.input_ids[:tokens] = batch.input_ids
        pool.tokens[:] = EOS
        group.batch, group.seen = batch, []
        with torch.no_grad():
            for run in between:
                run()
        assert_equal([one.unflatten(-1, (HEADS, DIM)) for one in group.seen], batch.right)


def test_a_graph_of_a_whole_forward_is_refused_where_it_is_captured(engine, monkeypatch):
    """It would have zeros for ever."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for run in (engine.qwen4._start, lambda where: engine.qwen4._fill(None, where)):
        with pytest.raises(RuntimeError, match="a graph of a whole forward is captured"):
            run(SimpleNamespace(is_cuda=True))


def test_warming_up_tuning_and_capturing_ask_nobody(ranks, engine):
    group, batch = ranks(1).make(), decode(np.random.default_rng(0), [1, 2])
    right, _ = read(group, batch)
    stats, counts = group.made[0].worker.client.stats, group.made[0].worker.counts
    asked = stats.bytes["wire"]
    found, _ = engine.ours._quietly(read, group, batch)
    assert not any(one.any() for one in found)
    assert (stats.bytes["wire"], counts.steps, counts.dummies) == (asked, 1, 1)
    group.made[0].pool.tokens[:] = EOS
    assert_equal(read(group, batch)[0], right)
    assert stats.steps.total() == 2, "all layers of a forward are one request"


def test_a_draft_model_has_no_part_in_it(ranks, engine):
    """It is made by the same class, in the same process, without n-grams."""
    group = ranks(1).make()
    worker, embeddings = group.made[0].worker, group.made[0].worker.embeddings
    group.config.ple_layer_ids = []
    with group.at(0):
        group.model()
    assert worker.embeddings is embeddings


# --- forwards that go wrong


@pytest.mark.parametrize("policy", ["mask", "raise"])
def test_a_server_that_is_silent_costs_a_forward_its_rows_and_the_next_none(ranks, served, policy):
    batch = decode(np.random.default_rng(1), [1, 2])
    right, _ = read(ranks(1).make(), batch)
    group = ranks(1, timeout_s=0.3, on_failure=policy, breaker_failures=0).make()
    with served("bfloat16").frozen():
        found, _ = read(group, batch)
    if policy == "raise":
        assert isinstance(found, DeadlineError)
    else:
        assert not any(one.any() for one in found)
        assert group.made[0].worker.counts.masked == dict.fromkeys(LAYERS, 2)

    def again():
        group.made[0].pool.tokens[:] = EOS
        return read(group, batch)[0]

    # The server was woken, and may take its time: within the test's own limit rows come again.
    found = next(found for found in iter(again, None) if isinstance(found, list) and all(one.any() for one in found))
    assert_equal(found, right)


def test_ranks_come_to_one_outcome_in_each_layer(ranks):
    """What another rank says of a layer's tokens holds here; test_agreement.py has ranks that are processes."""
    group, batch = ranks(2), decode(np.random.default_rng(1), [1, 2])
    group.make()
    group.others = iter(np.array(votes, bool) for votes in ([1, 0, 1], [1, 1, 0], [1, 1, 1], [1, 1, 1]))
    found, _ = read(group, batch)
    assert "another rank of this group" in str(found)
    counts = group.made[0].worker.counts
    assert (counts.masked, counts.failed, counts.steps) == ({2: 1, 5: 0}, 1, 1)
    assert all(one.any() for one in read(group, batch)[0])


def test_a_batch_that_cannot_be_asked_for_is_an_error_of_its_layers(ranks, monkeypatch):
    """So that other ranks, which wait there, learn of it."""
    group, batch = ranks(1, on_failure="mask").make(), decode(np.random.default_rng(1), [1, 2])
    with monkeypatch.context() as patch:
        patch.setattr(group.made[0].worker, "_staging_of", lambda tokens: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            read(group, batch)
    assert all(one.any() for one in read(group, batch)[0])


def test_a_forward_that_is_left_in_the_midst_is_given_up_by_the_next(ranks, engine):
    group, random = ranks(1).make(), np.random.default_rng(1)
    batch = decode(random, [1, 2])
    right, _ = read(group, batch)
    for left in (decode(random, [3, 4]), extend(random, [5])):  # prepared, and the model fails
        group.batch = left
        tokens = left.input_ids
        engine.model._prepare_ple_batch(tokens, left, ngram_size=DEPTH + 1, ngram_eos_token_id=EOS)
        group.made[0].pool.tokens[:] = EOS
        assert_equal(read(group, batch)[0], right)
    table = group.made[0].worker.embeddings[0].ngram_embedding
    with pytest.raises(PoolError, match="rows of 2 tokens were asked for, and of 5 are wanted"):
        table(torch.zeros(5, HEADS, dtype=torch.int64))
    with pytest.raises(PoolError, match="its forward has them"):
        table.gather(torch.zeros(5, HEADS, dtype=torch.int64))


# --- the start


def test_the_engines_loader_loads_no_row_of_a_table(ranks):
    for form in ("bfloat16", "float8_e4m3fn"):
        with ranks(2, form).make().at(1) as made:
            assert sum("layer_multipliers" in name for name in made.loaded) == len(LAYERS)
            loaded = made.model.load_weights(weights(form))
            assert sum("ngram_embedding.weight" in name for name in loaded) == len(LAYERS) * (1 + (form != "bfloat16"))
            for one in made.worker.embeddings:
                table = one.ngram_embedding
                assert (tuple(table.weight.shape), table.columns) == ((0, DIM), slice(8, 16))
                scale = torch.tensor([SCALE if form != "bfloat16" else 1.0]).bfloat16()
                assert torch.equal(table.weight_scale, scale)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda group: setattr(group.config, "ple_offload_embedding", False), "start SGLang with --ple-offload-embed"),
        (lambda group: setattr(group.parallel, "pp_size", 2), "without pipeline parallelism"),
        (lambda group: setattr(group.parallel, "attn_dp_size", 2), "with SGLANG_USE_ATTN_TP_NGRAM=1"),
        (lambda group: group.backends.update(decode="full"), "with --cuda-graph-backend-decode breakable"),
        (lambda group: setattr(group.settings, "speculative_algorithm", "NEXTN"), "decode disabled, as there is a"),
        (lambda group: setattr(group.parallel, "attn_cp_size", 2), "without context parallelism"),
    ],
)
def test_a_way_to_start_that_cannot_be_served_is_refused(ranks, change, said):
    group = ranks(1)
    change(group)
    with pytest.raises(RuntimeError, match=said):
        group.make()


def test_more_ranks_than_columns_are_refused(ranks):
    with pytest.raises(RuntimeError, match="32 tensor-parallel ranks cannot share 16 columns"):
        ranks(32).make()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ngram_vocab_size_base": 400}, "layer_2: rows of head 0"),
        ({"ple_layer_ids": [2, 4]}, r"layers: \[2, 4\] here, \[2, 5\] there"),
        ({"eos_token_id": 8}, "layer_2: fill 8 here, 7 there; layer_2: stop 8"),
        ({"ple_embedding_dtype": "float8_e4m3fn"}, "32 bytes a row here, 64 there"),
    ],
)
def test_a_server_of_another_model_is_refused_before_the_first_lookup(ranks, change, said):
    with pytest.raises(FingerprintError, match=said):
        ranks(1, config=change).make()


@pytest.mark.parametrize("form", ["bfloat16", "float8_e4m3fn"])
def test_a_checkpoint_of_other_constants_is_refused_when_it_is_loaded(ranks, form, monkeypatch):
    with ranks(1, form).make().at(0) as made:
        named = dict(weights(form, tables=False))
        made.model.load_weights(named.items())
        place = PLACE.format(1, "layer_multipliers")
        with pytest.raises(FingerprintError, match="layer_2: multipliers"):
            made.model.load_weights({**named, place: named[place] + 2}.items())
        made.model.load_weights(named.items())
        table = made.worker.client.spec.tables[0]
        for scale in (float(made.worker.embeddings[0].ngram_embedding.weight_scale), None):
            monkeypatch.setitem(table.__dict__, "scale", scale)
            made.model.load_weights(named.items())
        monkeypatch.setitem(table.__dict__, "scale", 0.5)
        with pytest.raises(FingerprintError, match=r"the table's scale is .* here, 0\.5 there"):
            made.model.load_weights(named.items())


def test_another_qwen4_is_refused_by_its_functions(engine, monkeypatch):
    ours = {name: parameters for name, parameters in plugin.PARAMETERS.items() if "qwen4_exp" in name}
    assert len(ours) == 13
    monkeypatch.setattr(plugin, "PARAMETERS", ours)
    plugin.check_parameters()
    monkeypatch.setattr(engine.Pinned, "reduce", lambda self, output, group: None)
    with pytest.raises(RuntimeError, match=r"reduce\(self, output\) is now: self output group"):
        plugin.check_parameters()


def test_a_server_that_is_away_is_an_error_of_the_start(ranks):
    with pytest.raises(PoolError):
        ranks(1, target="127.0.0.1:1", connect_timeout_s=0.2).make()
