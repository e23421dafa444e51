"""Writing packed models: whole, or not at all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from engrampool_server.files.staging import OutputError, staging
from engrampool_server.files.synth import fill_rows, synthetic_model
from engrampool_server.files.table_writer import write_tables

ReadAll = Callable[[Path], dict[int, npt.NDArray[np.uint8]]]


def test_an_output_that_exists_is_left_alone(tmp_path: Path) -> None:
    spec = synthetic_model("gemma-ple", 10).spec
    for out in (tmp_path / "directory", tmp_path / "file"):
        out.mkdir() if out.name == "directory" else out.write_text("mine")
        with pytest.raises(OutputError, match="exists already"):
            write_tables(out, spec, {}, fill_rows)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["directory", "file"]


def test_a_failure_with_nothing_finished_leaves_nothing(tmp_path: Path) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with pytest.raises(OutputError, match="Input/output error"):
        write_tables(tmp_path / "out", synthetic_model("gemma-ple", 10).spec, {}, fail)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_run_is_taken_up_only_from_its_own_source(
    tmp_path: Path, read_all: ReadAll, expected_rows: ReadAll
) -> None:
    spec = synthetic_model("gemma-ple", 40).spec
    filled = []

    def fill(table: Any, start: int, out: npt.NDArray[np.uint8]) -> None:
        if start == 20 and not filled.count(20):
            filled.append(20)
            raise KeyboardInterrupt
        filled.append(start)
        fill_rows(table, start, out)

    settings = {"file_bytes": 1, "block_bytes": spec.table(0).row_bytes * 10}
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        write_tables(out, spec, {"origin": "here"}, fill, **settings)
    assert sorted(filled) == [0, 10, 20]
    with pytest.raises(OutputError, match="its origin differs"):
        write_tables(out, spec, {"origin": "there"}, fill, **settings)
    with pytest.raises(OutputError, match="its block_bytes differs"):
        write_tables(out, spec, {"origin": "here"}, fill, file_bytes=1, block_bytes=1)
    assert not out.exists()
    write_tables(out, spec, {"origin": "here"}, fill, **settings)
    assert sorted(filled) == [0, 10, 20, 20, 30]
    assert np.array_equal(read_all(out)[0], expected_rows(out)[0])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_runs_do_not_write_one_output(tmp_path: Path) -> None:
    with staging(tmp_path / "out", {}) as stage:
        stage.record("layer_0", [])
        with pytest.raises(OutputError, match="another process is writing"), staging(tmp_path / "out", {}):
            pass


def test_a_directory_that_is_not_ours_is_not_taken_over(tmp_path: Path) -> None:
    mine = tmp_path / "out.partial" / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("keep")
    with pytest.raises(OutputError, match="in the way"), staging(tmp_path / "out", {}):
        pass
    assert mine.read_text() == "keep"


def test_too_little_space_is_said_before_writing(tmp_path: Path) -> None:
    spec = synthetic_model("gemma-ple", 2**31 - 1).spec  # 31 TiB
    with pytest.raises(OutputError, match=r"needs 30720\.\d+ GiB .* GiB too little"):
        write_tables(tmp_path / "out", spec, {}, fill_rows)
    assert not list(tmp_path.iterdir())
