"""The engines' own layers on a GPU: its streams, events and graphs. Needs one, and runs no kernel in an interpreter.

`make test-engines-gpu` runs this alone. The GPU is kept busy for longer than a lookup takes, and forwards follow each
other as closely as the engine lets them; what layers read is compared when all are over.
"""

from types import SimpleNamespace

import numpy as np
import pytest

from engine_schedule import schedule

torch = pytest.importorskip("torch", reason="PyTorch is not installed; `make test-engines` installs it")
pytest.importorskip("vllm", reason="the engines are not there; `make test-engines` unpacks them")
if not torch.cuda.is_available():
    pytest.skip("PyTorch finds no GPU here", allow_module_level=True)

from sglang_ranks import Comparison, scheduled, step, with_plugin  # noqa: E402  (needs torch)
from sglang_ranks import Ranks as SglangRanks  # noqa: E402
from sglang_ranks import forward_of as sglang_forward  # noqa: E402
from vllm_ranks import MAX_TOKENS, bits, hashed, stock_layers  # noqa: E402
from vllm_runner import engine_of, exact  # noqa: E402

BUSY = 2_000_000  # cycles of the GPU, about a millisecond


def busy() -> None:
    torch.cuda._sleep(BUSY)


class OfTheHost:
    """Pinned memory, for PyTorch to take as the GPU's."""

    def __init__(self, tensor):
        array = tensor.numpy()
        self.__cuda_array_interface__ = {
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (tensor.data_ptr(), False),
            "version": 2,
        }


# --- vLLM


@pytest.mark.parametrize("size", [1, 2])
def test_vllms_forwards_without_graphs_read_the_stocked_tables_rows(ranks, spec, sequences, same, size):
    group = ranks(size, device="cuda").make()
    state = group.made[0].state
    stocked = stock_layers(group, state.layout, spec)
    found = []
    for seed in range(16):
        ids = hashed(state, sequences(seed, spec.vocab_size, longest=16))
        if seed % 3 == 1:
            ids[::3] = -1
        for rank in range(size):
            busy()
            with group.at(rank) as made:
                for at, layer in enumerate(made.layers):
                    layer.prepare_embeddings(ids[:, at])
                ids_now = ids.clone()
                busy()
                for at, layer in enumerate(made.layers):
                    ours = layer._ready_rows(len(ids)).clone()
                    stocked[rank][at].prepare_embeddings(ids_now[:, at])
                    found.append((stocked[rank][at]._ready_rows(len(ids)).clone(), ours))
    for theirs, ours in found:
        same("vllm", f"Engram.staged_rows on a GPU, TP {size}", bits(theirs), bits(ours))


def test_vllms_graphs_with_breaks_read_the_rows_of_each_replay(ranks, spec, same, monkeypatch):
    from vllm.compilation import breakable_cudagraph as graphs

    monkeypatch.setattr(graphs, "_weak_ref_capture_arg", lambda one: one)  # the engine's compiled code is not here
    random = np.random.default_rng(1)
    with ranks(1, device="cuda").make().at(0) as made:
        ids = torch.zeros(64, 2, 24, dtype=torch.int32, device="cuda")
        outs = [torch.zeros(64, 24, 256, dtype=torch.bfloat16, device="cuda") for _ in made.layers]

        def forward():
            for at, layer in enumerate(made.layers):
                layer.prepare_embeddings(ids[:, at])
            busy()
            for out, layer in zip(outs, made.layers, strict=True):
                out.copy_(layer._ready_rows(64))

        stream = torch.cuda.Stream()
        with made.worker.supply.quiet(), torch.cuda.stream(stream):
            forward()
            torch.cuda.synchronize()
            with graphs.BreakableCUDAGraphCapture() as captured:
                forward()
        assert (captured.num_eager_breaks, made.worker.client.stats.begun) == (4, 0)
        found = []
        with torch.cuda.stream(stream):
            for _ in range(20):
                given = torch.from_numpy(random.integers(0, spec.tables[0].num_rows, ids.shape).astype(np.int32))
                ids.copy_(given.pin_memory(), non_blocking=True)
                captured.replay()
                found.append((given, [out.clone() for out in outs]))
        torch.cuda.synchronize()
        for given, read in found:
            for at, one in enumerate(read):
                same(
                    "vllm",
                    "Engram.staged_rows in graphs with breaks",
                    bits(exact(spec, at, given[:, at].numpy())),
                    bits(one),
                )


@pytest.fixture
def whole(monkeypatch):
    """The engine's runner, with memory of the host that its kernels read: its own way there is compiled code."""
    import vllm.v1.worker.gpu.buffer_utils as buffer_utils
    import vllm.v1.worker.gpu.model_runner as model_runner

    def view(tensor):
        return torch.as_tensor(OfTheHost(tensor), device="cuda")

    monkeypatch.setattr(buffer_utils, "get_accelerator_view_from_cpu_tensor", view)
    return model_runner


@pytest.mark.parametrize(("seed", "drafts"), [(0, 0), (1, 0), (2, 2), (3, 3)])
def test_vllms_graphs_of_whole_forwards_read_the_rows_of_each_replay(ranks, whole, spec, same, seed, drafts):
    with engine_of(ranks, whole, drafts, device="cuda") as engine:
        layers = engine.made.layers
        engine.state.prepare_dummy_inputs(2, MAX_TOKENS)
        outs = [torch.zeros_like(layer.staged_rows) for layer in layers]

        def forward():
            busy()
            for out, layer in zip(outs, layers, strict=True):
                out.copy_(layer._ready_rows(MAX_TOKENS))

        forward()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            forward()
        found, ends = [], []
        for moment, _ in schedule(seed, spec.vocab_size, drafts=drafts, steps=40, longest=60, numbers=6):
            if len(ends) > 1:
                ends[-2].synchronize()  # as the engine does: two forwards at most are under way
            engine.begin(moment)
            ids = engine.hashed().clone()
            graph.replay()
            found.append((ids, [out.clone() for out in outs], engine.batch.num_tokens_after_padding))
            engine.end(moment)
            ends.append(torch.cuda.Event())
            ends[-1].record()
        torch.cuda.synchronize()
        for ids, read, padded in found:
            for at, one in enumerate(read):
                right = exact(spec, at, ids[:, at].cpu().numpy())
                same("vllm", f"graphs of whole forwards, {drafts} drafts", bits(right), bits(one[: len(ids)]))
                assert not one[len(ids) : padded].view(torch.int16).any(), "tokens that pad the graph have zeros"
        counts = engine.made.worker.counts
    assert counts.early["served"] > counts.tokens / 4
    assert (counts.failed, counts.masked) == (0, {1: 0, 14: 0})


def test_a_silent_pool_costs_vllms_whole_graphs_their_rows_by_the_deadline(ranks, whole, spec, server):
    from vllm_runner import Moment, assert_right, prompts

    settings = {"timeout_s": 0.3, "on_failure": "mask", "breaker_failures": 0}
    with engine_of(ranks, whole, device="cuda", **settings) as engine:
        moment = prompts(5, 6)
        with server.frozen():
            busy()
            engine.begin(moment)
            assert not any(read.view(torch.int16).any() for read in engine.read())
        again = Moment(removed=[0, 1], added=moment.added, chunks=moment.chunks, sampled=moment.sampled)
        while True:  # until the server is awake, which the test's own limit bounds
            engine.begin(again)
            if all(read[:11].view(torch.int16).any() for read in engine.read()):
                break
        assert_right(engine, spec)


# --- SGLang


@pytest.fixture(scope="module")
def sglang(server):
    with with_plugin(server) as engine:
        yield engine


@pytest.fixture
def group(sglang, config, server, tokenizer_path, monkeypatch):
    """One rank's layers; closed at the end."""
    from transformers import AutoTokenizer

    def hasher(layout):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
        made = sglang.module.EngramHasher(
            layout, tokenizer, config.engram_pad_token_id, config.engram_compressed_vocab_size
        )
        made.image_token_id = 1000
        return made

    made = SglangRanks(sglang, config, monkeypatch, 1, hasher, device="cuda", target=server.address).make()
    yield made
    made.close()


def test_sglangs_forwards_read_the_stocked_tables_rows(group, spec, sequences, same_bits):
    compared = Comparison(group, spec, same_bits)
    for seed in range(6):
        made = sequences(seed, spec.vocab_size, longest=16)
        busy()
        compared.extend(made, staged=seed % 3 != 1)
        random, lengths = np.random.default_rng(seed), np.array([len(past) for past in made.histories])
        slots = np.append(np.arange(len(lengths)), [0, 0])
        for _ in range(3):
            tokens = random.integers(0, spec.vocab_size, len(slots))
            positions, locations = np.append(lengths, [0, 0]), [1] * len(lengths) + [0, 0]
            busy()
            compared.step("decode", "DECODE", tokens, positions, slots, locations=locations)
            lengths += 1
        block = random.integers(0, spec.vocab_size, (len(lengths), 4))
        positions = (lengths[:, None] + np.arange(4)).reshape(-1)
        compared.step("verify", "TARGET_VERIFY", block.reshape(-1), positions, slots[:-2], block=4)


def test_sglangs_staged_prompts_follow_each_other_while_the_gpu_is_behind(group, spec, sequences, same_bits):
    stocked, found = group.stock(spec)[0], []
    with group.at(0) as made:
        for seed in range(12):
            chunks = sequences(seed, spec.vocab_size, longest=16)
            batch = made.manager.prepare_for_forward(scheduled(chunks), chunked_req=None)
            busy()
            forward, tokens = sglang_forward(batch, chunks, "cuda")
            ids = made.hasher(tokens, forward)
            for at, layer in enumerate(made.layers):
                ours = layer.embed_rows(ids[:, at], forward, False).clone()
                bare = SimpleNamespace(**{**vars(forward), "engram_staged_rows": None})
                found.append((stocked[at].embed_rows(ids[:, at], bare, False).clone(), ours))
    for theirs, ours in found:
        same_bits("sglang", "EngramEmbedding, staged, on a GPU", theirs, ours)


def test_sglangs_decode_in_a_graph_with_breaks_reads_the_rows_of_each_replay(
    group, sglang, spec, same_bits, monkeypatch
):
    from sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph import breakable_cuda_graph as graphs

    monkeypatch.setattr(graphs, "_weak_ref_if_tensor", lambda one: one)  # the engine's compiled code is not here
    stocked, random, real = group.stock(spec)[0], np.random.default_rng(3), 6
    with group.at(0) as made:
        locations = [1] * real + [0, 0]
        forward, tokens = step(
            "DECODE", np.zeros(8, np.int64), np.zeros(8, np.int64), np.arange(8), locations=locations, device="cuda"
        )
        row_ids = torch.zeros(8, 2, 24, dtype=torch.int64, device="cuda")
        outs = [torch.zeros(8, 24, 256, dtype=torch.bfloat16, device="cuda") for _ in made.layers]

        def run():
            ids = made.hasher(tokens, forward)
            row_ids.copy_(ids)
            busy()
            for at, layer in enumerate(made.layers):
                outs[at].copy_(layer.embed_rows(ids[:, at], forward, False))

        stream, graph = torch.cuda.Stream(), graphs.BreakableCUDAGraph()

        def capture():
            with torch.cuda.stream(stream):
                run()
            torch.cuda.synchronize()
            with graphs.BreakableCUDAGraphCapture(graph, stream=stream):
                run()

        sglang.ours._quietly(capture)
        assert (len(graph._break_fns), made.worker.client.stats.begun) == (3, 0)
        found = []
        with torch.cuda.stream(stream):
            for at in range(24):
                given = torch.from_numpy(random.integers(0, spec.vocab_size, 8))
                tokens.copy_(given.pin_memory(), non_blocking=True)
                forward.positions.fill_(at)
                graph.replay()
                found.append((row_ids.clone(), [out.clone() for out in outs]))
        torch.cuda.synchronize()
        for ids, read in found:
            for at, one in enumerate(read):
                theirs = stocked[at].embed_rows(ids[:real, at], None, False)
                same_bits("sglang", "EngramEmbedding, decode in a graph with breaks", theirs, one[:real])
                assert not one[real:].view(torch.int16).any(), "what pads a graph has zeros"
