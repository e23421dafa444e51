"""The example that trains a small Engram model and compares logits, with few steps: it agrees, and could disagree."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed; `make test-torch` installs it")
EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny_engram_lm.py"


@pytest.fixture
def example(monkeypatch):
    spec = importlib.util.spec_from_file_location("tiny_engram_lm", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "BATCH", 2)  # it need not learn anything
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as its `main` does
    yield module
    torch.set_num_threads(threads)


def test_every_combination_gives_the_same_logits_and_text(example):
    done = subprocess.run(
        [sys.executable, EXAMPLE, "--steps", "3", "--new", "6"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if "bit-equal" in line]
    assert len(lines) == len(example.COMBINATIONS)
    assert all(line.count("bit-equal") == 2 for line in lines)
    # Each setting did what it is there for.
    assert ["attached 100%" in line for line in lines] == [
        "memory" in server and client.get("attach") != "off" for client, server in example.COMBINATIONS
    ]
    assert ["cache " in line for line in lines] == ["cache_bytes" in client for client, _ in example.COMBINATIONS]


def test_one_wrong_value_in_a_table_is_noticed(example, monkeypatch, tmp_path, capfd):
    """Every row of the local tables has one value of the other sign."""
    monkeypatch.setattr(example, "COMBINATIONS", example.COMBINATIONS[:1])
    make = example.local_table

    def altered(values, scales):
        values = values.clone()
        values.view(torch.uint8)[:, 0] ^= 128  # its sign
        return make(values, scales)

    monkeypatch.setattr(example, "local_table", altered)
    assert example.run(tmp_path, 2, 3) == 1
    assert "forward 0 differs by" in capfd.readouterr().out


def test_a_comparison_that_look_back_does_not_matter_to_fails(example, monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(example, "COMBINATIONS", example.COMBINATIONS[:1])
    monkeypatch.setattr(example, "CHUNK", example.PROMPT)  # no chunk has anything before it
    assert example.run(tmp_path, 2, 1) == 1
    assert "a lookup without look-back was not noticed" in capfd.readouterr().out
