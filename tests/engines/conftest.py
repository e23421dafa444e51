"""The engines' own code, and a count of what was compared with it. `make test-engines` sets this up, on a CPU.

Nothing of hashing, tables or layers is replaced. What is: packages that the engines import and that none of this calls,
and in `test_vllm.py` and `test_sglang.py` the engine's config and its tensor-parallel group.
"""

import importlib.machinery
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest

from engrampool_client.testing import ServerProcess, serve_process
from engrampool_proto.hashing import TokenBatch
from engrampool_proto.spec import ModelSpec
from small_model import CONFIG, TOKENIZER, small_spec, write_model

HERE = find_spec("vllm") is not None
_COMPARED: Counter[str] = Counter()
_KEPT: list[Any] = []
# Imported by SGLang's configs of models that see, and by its scheduler's process; nothing here is either.
_VISION = ("", ".io", ".transforms", ".transforms.functional", ".transforms.v2", ".transforms.v2.functional")
_UNUSED = (*(f"torchvision{name}" for name in _VISION), "setproctitle", "uvicorn")
# What they have compiled for a GPU: modules under these names, and what vLLM asks of its own while it is imported.
_COMPILED = ("sgl_kernel", "flashinfer", "deep_gemm", "torchvision")
_SUPPORT = ("cutlass_scaled_mm_supports_block_fp8", "cutlass_scaled_mm_supports_fp8", "cutlass_group_gemm_supported")


def pytest_configure(config: pytest.Config) -> None:
    if not HERE:
        return
    for name in [name for name in _UNUSED if find_spec(name.partition(".")[0]) is None]:
        module = MagicMock(name=name, __version__="0")
        module.__spec__, module.__path__ = importlib.machinery.ModuleSpec(name, None), []
        sys.modules[name] = module
    if os.environ.get("TRITON_INTERPRET") == "1":
        # Before Triton is imported: its kernels run in its interpreter, and vLLM keeps them though there is no GPU.
        assert os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    else:
        _go_without_compiled_code()


def _go_without_compiled_code() -> None:
    """Have the engines be imported on a GPU without it. None of it has a part in what is tested."""
    import torch

    sys.meta_path.append(_Compiled())
    sys.modules["vllm.vllm_flash_attn"] = _Compiled().create_module(
        importlib.machinery.ModuleSpec("vllm.vllm_flash_attn", None)
    )
    library = torch.library.Library("_C", "FRAGMENT")
    for name in _SUPPORT:
        library.define(f"{name}(int capability) -> bool")
        library.impl(name, lambda capability: False, "CompositeExplicitAutograd")
    _KEPT.append(library)


class _Compiled:
    """Finds modules that are not installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        wanted = name.partition(".")[0] in _COMPILED or name.startswith("vllm._")
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if wanted else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Any:
        module = MagicMock(name=spec.name, __version__="99.0")
        module.__spec__, module.__path__ = spec, []
        return module

    def exec_module(self, module: Any) -> None:
        """There is nothing to run."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "engines" in item.path.parts:
            # The engines' packages warn of much when they are imported, and so does the interpreter.
            item.add_marker(pytest.mark.filterwarnings("default"))
            # Forks come of a process that imports more than is installed here.
            item.add_marker("executed")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for what, count in _COMPARED.items():
        terminalreporter.write_line(f"compared: {count:>10,} values, {what}")


@pytest.fixture(scope="session")
def same() -> Callable[[str, str, np.ndarray, np.ndarray], None]:
    """Assert that arrays are equal, and count their values under the engine's version and the code that made them."""

    def same(engine: str, code: str, theirs: np.ndarray, ours: np.ndarray) -> None:
        np.testing.assert_array_equal(ours, theirs)
        assert ours.shape == theirs.shape
        _COMPARED[f"{engine} {metadata.version(engine)} {code}"] += ours.size

    return same


def _integers(tensor: Any) -> np.ndarray:
    import torch

    return tensor.contiguous().view(torch.int16).cpu().numpy()


@pytest.fixture(scope="session")
def same_bits(same: Callable[[str, str, np.ndarray, np.ndarray], None]) -> Callable[[str, str, Any, Any], None]:
    """`same`, of tensors of bfloat16, to the bit."""

    def same_bits(engine: str, code: str, theirs: Any, ours: Any) -> None:
        assert str(theirs.dtype) == str(ours.dtype) == "torch.bfloat16"
        same(engine, code, _integers(theirs), _integers(ours))

    return same_bits


@pytest.fixture(scope="session")
def config() -> SimpleNamespace:
    """What the engines read of a config.json: of a small model with V4.1's structure."""
    tables = {table.layer: table.num_rows for table in small_spec().tables}
    return SimpleNamespace(**CONFIG, engram_num_embeddings=[tables[layer] for layer in CONFIG["engram_layer_ids"]])


@pytest.fixture(scope="session")
def spec() -> ModelSpec:
    return small_spec()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, spec: ModelSpec) -> Iterator[ServerProcess]:
    with serve_process(write_model(tmp_path_factory.mktemp("served") / "model", spec)) as server:
        yield server


@pytest.fixture(scope="session")
def tokenizer_path() -> str:
    return str(TOKENIZER.parent)


@dataclass
class Sequences:
    """A batch of chunks of longer sequences, as an engine has them. starts: where each chunk begins in its sequence.

    histories, dead: each sequence up to the end of its chunk.
    """

    starts: list[int]
    histories: list[np.ndarray]
    dead: list[np.ndarray]
    depth: int = 3

    @property
    def bounds(self) -> np.ndarray:
        lengths = [len(past) - start for past, start in zip(self.histories, self.starts, strict=True)]
        return np.cumsum([0, *lengths]).astype(np.int32)

    @property
    def positions(self) -> np.ndarray:
        runs = [np.arange(start, len(past)) for past, start in zip(self.histories, self.starts, strict=True)]
        return np.concatenate(runs)

    def before(self, values: list[np.ndarray], absent: int) -> np.ndarray:
        """[requests, depth]: what stands before each chunk, the nearest first."""
        rows = []
        for one, start in zip(values, self.starts, strict=True):
            nearest = one[max(0, start - self.depth) : start][::-1]
            rows.append([*nearest.tolist(), *[absent] * (self.depth - len(nearest))])
        return np.array(rows)

    def chunks(self, values: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([one[start:] for one, start in zip(values, self.starts, strict=True)])

    @property
    def batch(self) -> TokenBatch:
        return TokenBatch.of(
            self.chunks(self.histories).astype(np.int32),
            self.bounds,
            self.before(self.histories, -1).astype(np.int32),
            self.chunks(self.dead),
            self.before(self.dead, 0).astype(np.bool_),
        )


@pytest.fixture(scope="session")
def sequences() -> Callable[..., Sequences]:
    """Random batches: chunks that begin a sequence, go on after a prefix, or are one token of decoding; dead spans."""

    def make(seed: int, vocab: int, *, dead: bool = True, requests: int = 7, longest: int = 40) -> Sequences:
        random = np.random.default_rng(seed)
        made = Sequences([], [], [])
        for number in range(requests):
            prefix = 0 if number % 3 == 0 else int(random.integers(1, 9))
            length = 1 if number % 4 == 3 else int(random.integers(1, longest))
            # Some sequences repeat few tokens, so that n-grams come again.
            tokens = random.integers(0, vocab if number % 2 else 50, prefix + length)
            spans = (random.random(prefix + length) < 0.15) if dead else np.zeros(prefix + length, bool)
            made.starts.append(prefix)
            made.histories.append(tokens)
            made.dead.append(spans)
        return made

    return make


@pytest.fixture(scope="session")
def engine(server: ServerProcess) -> SimpleNamespace:
    """vLLM's module with our plugin in it, put there by the engine's own loader; `Stock` is what it was."""
    from vllm_ranks import with_plugin

    return with_plugin(server)


@pytest.fixture
def ranks(engine, config, server, tokenizer_path, monkeypatch):
    """Ranks of a size; made, and closed at the end."""
    import torch

    from vllm_ranks import Ranks

    states = []

    def state(layout):
        """The engine's own hashes; it reads the tokenizer for as long as a second, so only once."""
        with pytest.MonkeyPatch.context() as patch:
            if states:
                tokens = (states[0].token_map.tolist(), layout.compressed_vocab_size)
                patch.setattr(engine.module, "build_compressed_token_map", lambda _: tokens)
            model = SimpleNamespace(tokenizer=tokenizer_path, trust_remote_code=False, revision=None)
            cache = SimpleNamespace(block_size=64, kv_cache=torch.zeros(1))
            vllm_config = SimpleNamespace(model_config=model, use_v2_model_runner=True)
            states.append(engine.module.NgramHashState(vllm_config, layout, cache))
        return states[-1]

    made = []

    def ranks(size, **settings):
        made.append(Ranks(engine, config, monkeypatch, size, state, **{"target": server.address, **settings}))
        return made[-1]

    yield ranks
    for one in made:
        one.close()


@pytest.fixture
def capture():
    """SGLang's capture of a graph in pieces, pretended: it keeps what runs between them, for replays."""
    import sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph.breakable_cuda_graph as breakable
    import sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph.context as context

    pieces = []

    def end():
        assert pieces.pop() == "open", "there is no break within a break"

    capture = SimpleNamespace(
        cuda_graph=breakable.BreakableCUDAGraph(),
        _barrier_fn=None,
        _begin_new_segment=lambda: pieces.append("open"),
        _end_current_segment=end,
    )

    @contextmanager
    def capturing():
        pieces.append("open")
        token = breakable._current_capture_var.set(capture)
        try:
            yield capture.cuda_graph._break_fns
        finally:
            breakable._current_capture_var.reset(token)
            end()

    with context.enable_breakable_cuda_graph():
        yield capturing
