"""The commands on files, as a user meets them: output, errors, exit codes."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engrampool_proto.cli import main
from engrampool_server.files.table_files import PackedModel

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `engrampool` with arguments; returns exit code, standard output and standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["engrampool", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, captured.out, captured.err

    return call


def test_synth_pack_inspect_and_verify(run: Run, tmp_path: Path) -> None:
    checkpoint, packed, direct = tmp_path / "checkpoint", tmp_path / "packed", tmp_path / "direct"
    model = ("--like", "qwen-ple", "--vocab-size", 500)
    assert run("synth", *model, "--checkpoint-out", "--out", checkpoint) == (
        0,
        f"wrote the checkpoint {checkpoint}\n",
        "",
    )
    code, written, _ = run("synth", *model, "--out", direct, "--quiet")
    assert code == 0
    code, said, _ = run("pack", "--checkpoint", checkpoint, "--out", packed, "--file-mib", 1)
    version = said.split()[-1]
    assert (code, said) == (0, f"packed {packed}, version {version}\n")
    assert written.split()[-1] == version
    assert run("verify", packed) == (0, f"{packed} is whole: 1 blocks, version {version}\n", "")
    code, text, _ = run("inspect", packed)
    assert code == 0
    for fact in ("qwen-ple", version, "layer 2", "160 bytes", "float8_e4m3fn x 160", "xor_mix, 16 heads", "0.015625"):
        assert fact in text


def test_inspect_gives_json(run: Run, packed_model: Callable[[str], Path]) -> None:
    directory = packed_model("deepseek-v4.1")
    code, text, _ = run("inspect", directory, "--json")
    facts = json.loads(text)
    with PackedModel.open(directory) as model:
        assert (code, facts["version"], facts["nbytes"]) == (0, model.version, model.spec.nbytes)
        assert facts["token_map"] == {"size": 99092, "digest": model.spec.token_map.digest}
        assert [t["layer"] for t in facts["tables"]] == [1, 14]
        assert sum(len(t["files"]) for t in facts["tables"]) == facts["num_files"] == len(model.files)
    code, text, _ = run("inspect", directory)
    assert code == 0
    assert "ids below 129280, mapped to 99092" in text


def test_verify_names_every_damaged_block(run: Run, packed_model: Callable[[str], Path], tmp_path: Path) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(packed_model("longcat"), directory)
    with PackedModel.open(directory) as model:
        blocks = model.blocks(0)
    damaged = [blocks[1], blocks[-1]]
    for block in damaged:
        with (directory / block.file).open("r+b") as file:
            file.seek(block.offset + 5)
            file.write(b"damage")
    code, out, err = run("verify", directory)
    lines = err.splitlines()
    assert (code, out, len(lines)) == (1, "", 3)
    for block, line in zip(damaged, lines, strict=False):
        assert f"{block.file}: layer 0 block {block.index} (rows {block.start} .. {block.stop - 1})" in line
    assert lines[-1] == f"engrampool: {directory}: 2 of {len(blocks)} blocks are damaged; do not serve it"


def test_what_is_wrong_is_one_line(run: Run, tmp_path: Path, packed_model: Callable[[str], Path]) -> None:
    packed, out = packed_model("gemma-ple"), tmp_path / "out"
    gemma = ("synth", "--like", "gemma-ple", "--vocab-size", 10)
    demo = ("synth", "--like", "engram-demo", "--vocab-size", 10)
    for arguments, message in (
        (("inspect", tmp_path), "is no packed model"),
        (("verify", tmp_path), "is no packed model"),
        (("pack", "--checkpoint", tmp_path / "absent", "--out", out), "is no directory"),
        (("pack", "--checkpoint", tmp_path, "--out", out), "config.json"),
        ((*gemma, "--out", packed), "exists already"),
        ((*gemma, "--out", packed / "manifest.json" / "x"), "Not a directory"),
        ((*gemma, "--out", out, "--name", "a b"), "name"),
        ((*demo, "--out", out, "--checkpoint-out"), "--tokenizer"),
        ((*demo, "--out", out, "--tokenizer", packed), "tokenizer"),
    ):
        code, said, err = run(*arguments)
        assert (code, said, err.count("\n")) == (1, "", 1), err
        assert err.startswith("engrampool: ")
        assert message in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ("pack",),
        ("inspect",),
        ("synth", "--like", "bert", "--vocab-size", 10, "--out", "x"),
        ("synth", "--like", "longcat", "--vocab-size", 1, "--out", "x"),
        ("synth", "--like", "longcat", "--vocab-size", 9),
        ("synth", "--like", "longcat", "--vocab-size", 9, "--checkpoint-out"),
        ("synth", "--like", "longcat", "--vocab-size", 9, "--checkpoint-out", "x", "--out", "y"),
        ("pack", "--checkpoint", "x", "--out", "y", "--file-mib", 0),
    ],
)
def test_wrong_usage_exits_with_2(run: Run, arguments: tuple[object, ...]) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert "Usage:" in err


def test_a_checkpoint_goes_where_either_option_says(run: Run, tmp_path: Path) -> None:
    gemma = ("synth", "--like", "gemma-ple", "--vocab-size", 10)
    for how, out in (
        (("--checkpoint-out", "--out", tmp_path / "a"), tmp_path / "a"),
        (("--checkpoint-out", tmp_path / "b"), tmp_path / "b"),
    ):
        assert run(*gemma, *how)[0] == 0
        assert (out / "model.safetensors.index.json").exists()
