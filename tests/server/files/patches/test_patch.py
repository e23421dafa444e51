"""Patches: what differs is what is written and served, and a damaged patch never gives a row."""

import json
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.numpy
import xxhash
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from engrampool_proto.errors import SpecError
from engrampool_proto.hashing import XorMix
from engrampool_proto.sharding import Part, whole
from engrampool_proto.spec import ModelSpec, RowFormat, Segment, TableSpec, digest
from engrampool_server.commands import files as commands
from engrampool_server.files.manifest import IsPatchError
from engrampool_server.files.patches.patch import PatchError, patch, write_patch
from engrampool_server.files.patches.patch_files import PatchFiles, open_any
from engrampool_server.files.sources import Url
from engrampool_server.files.staging import OutputError
from engrampool_server.files.table_files import PackedModel, TableFileError
from engrampool_server.files.table_writer import write_tables
from engrampool_server.memory.table_loader import LoadCancelledError, load, load_patched
from engrampool_server.memory.tables import LoadedModel
from stores import http_files

Rows = Mapping[int, npt.NDArray[np.uint8]]

SPEC = ModelSpec(
    "patched",
    64,
    (
        TableSpec(3, 500, RowFormat((Segment("values", "uint8", 33),)), XorMix((5, 9), ((211, 223),), fill=2)),
        TableSpec(7, 300, RowFormat((Segment("values", "uint8", 7),)), XorMix((5, 9), ((101, 103),), fill=2)),
    ),
)
ROWS = {
    t.layer: np.random.default_rng(t.layer).integers(0, 256, (t.num_rows, t.row_bytes), np.uint8) for t in SPEC.tables
}
# Blocks of 24 changed rows of layer 3 and 66 of layer 7.
BLOCK_BYTES = 1000
IDS = {3: np.arange(20, 480, 7, dtype=np.uint64), 7: np.arange(150, 290, 2, dtype=np.uint64)}


def write(directory: Path, rows: Rows, block_bytes: int = 1000, spec: ModelSpec = SPEC) -> Path:
    def fill(table: TableSpec, start: int, out: npt.NDArray[np.uint8]) -> None:
        out[:] = rows[table.layer][start : start + len(out)]

    write_tables(directory, spec, {}, fill, block_bytes=block_bytes)
    return directory


def changed_rows(ids: Mapping[int, npt.NDArray[np.uint64]] = IDS) -> dict[int, npt.NDArray[np.uint8]]:
    """All rows, those with these ids changed in one byte."""
    rows = {layer: rows.copy() for layer, rows in ROWS.items()}
    for layer, changed in ids.items():
        rows[layer][changed, changed % np.uint64(7)] ^= 1
    return rows


def hold(base: Path, part: Part | None = None) -> LoadedModel:
    with PackedModel.open(base) as model:
        return load(model, "anon", False, 2, threading.Event(), lambda _: None, part=part)


def hold_patched(
    directory: Path,
    base: LoadedModel,
    progress: Callable[[int], None] = lambda _: None,
    stop: threading.Event | None = None,
) -> LoadedModel:
    with PatchFiles.open(directory) as opened:
        return load_patched(opened, base, 2, stop or threading.Event(), progress)


def gathered(model: LoadedModel) -> dict[int, npt.NDArray[np.uint8]]:
    """Every row held, by a lookup of each."""
    found = {}
    for layer, table in model.tables.items():
        ids = np.arange(table.row_start, table.row_stop, dtype=np.uint32)
        found[layer] = np.zeros((len(ids), table.spec.row_bytes), np.uint8)
        table.gather(ids, found[layer].reshape(-1))
    return found


def read_all(directory: Path) -> None:
    with PatchFiles.open(directory) as opened:
        for nbytes, check in opened.checks():
            check(np.empty(nbytes, np.uint8))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("base") / "base", ROWS)


@pytest.fixture(scope="module")
def base_held(base: Path) -> LoadedModel:
    return hold(base)


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("new") / "new", changed_rows())


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory, base: Path, new: Path) -> Path:
    """Not to be changed."""
    directory = tmp_path_factory.mktemp("patch") / "patch"
    patch(base, new, directory, block_bytes=BLOCK_BYTES)
    return directory


@pytest.fixture
def copy(patched: Path, tmp_path: Path) -> Path:
    """The patch, free to be damaged."""
    return Path(shutil.copytree(patched, tmp_path / "copy"))


# Making and serving.


@settings(max_examples=12)
@given(
    ids=st.fixed_dictionaries(
        {}, optional={3: st.sets(st.integers(0, 499), min_size=1, max_size=200), 7: st.just({299})}
    ),
    base_bytes=st.integers(1, 3000),
    new_bytes=st.integers(1, 3000),
    patch_bytes=st.integers(1, 3000),
    shard=st.tuples(st.integers(0, 490), st.integers(1, 500)),
)
def test_what_differs_is_what_is_written_and_held(
    tmp_path_factory: pytest.TempPathFactory,
    ids: dict[int, set[int]],
    base_bytes: int,
    new_bytes: int,
    patch_bytes: int,
    shard: tuple[int, int],
) -> None:
    where = tmp_path_factory.mktemp("diff")
    changed = {layer: np.array(sorted(found), np.uint64) for layer, found in ids.items()}
    rows = changed_rows(changed)
    base, new = write(where / "base", ROWS, base_bytes), write(where / "new", rows, new_bytes)
    if not changed:
        with pytest.raises(PatchError, match=f"no row of {new} differs from {base}"):
            patch(base, new, where / "patch")
        assert sorted(path.name for path in where.iterdir()) == ["base", "new"]
        return
    version = patch(base, new, where / "patch", block_bytes=patch_bytes)
    with PackedModel.open(base) as model:
        given_rows = {layer: (found, rows[layer][found]) for layer, found in changed.items()}
        assert write_patch(model, given_rows, where / "again", block_bytes=patch_bytes) == version != model.version
    part = {3: range(shard[0], min(shard[0] + shard[1], 500)), 7: range(299, 300)}
    for held_part in (whole(SPEC), part):
        held = hold_patched(where / "patch", hold(base, held_part))
        assert held.version == version
        found = gathered(held)
        assert all(np.array_equal(found[layer], rows[layer][r.start : r.stop]) for layer, r in held_part.items())


def test_the_base_stays_as_it_is_and_its_memory_is_shared(patched: Path, base_held: LoadedModel) -> None:
    held = hold_patched(patched, base_held)
    for layer, table in held.tables.items():
        assert table.rows is base_held.tables[layer].rows
        assert not table.overlay.rows.flags.writeable
        assert np.array_equal(gathered(held)[layer], changed_rows()[layer])
        assert np.array_equal(gathered(base_held)[layer], ROWS[layer])


def test_nothing_of_a_patched_model_can_be_mapped(base: Path, tmp_path: Path) -> None:
    # Not even a table without changes: its memory says that it is of the base's version.
    with PackedModel.open(base) as model:
        write_patch(model, {3: (IDS[3], ROWS[3][IDS[3]])}, tmp_path / "patch")
        held = load(model, f"file:{tmp_path}", False, 1, threading.Event(), lambda _: None, attach="user")
    assert all(table.place for table in held.tables.values())
    tables = hold_patched(tmp_path / "patch", held).tables
    assert [(table.place, table.overlay is None) for table in tables.values()] == [(None, False), (None, True)]


def test_the_safetensors_library_reads_a_patch(patched: Path) -> None:
    for layer, ids in IDS.items():
        found = safetensors.numpy.load_file(patched / f"layer_{layer}-changed.safetensors")
        assert found.keys() == {"ids", "rows"}
        assert np.array_equal(found["ids"], ids)
        assert np.array_equal(found["rows"], changed_rows()[layer][ids])


def test_blocks_that_agree_are_not_read(base: Path, new: Path, patched: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(base, tmp_path / "damaged")
    with PackedModel.open(base) as model, PackedModel.open(new) as other:
        pairs = zip(model.blocks(7), other.blocks(7), strict=True)
        block = next(block for block, theirs in pairs if block.checksum == theirs.checksum)
        differing = model.blocks(3)[2]
    with (damaged / block.file).open("r+b") as file:
        file.seek(block.offset)
        file.write(b"damage")
    patch(damaged, new, tmp_path / "patch", block_bytes=BLOCK_BYTES)
    assert (tmp_path / "patch" / "manifest.json").read_bytes() == (patched / "manifest.json").read_bytes()
    with (damaged / differing.file).open("r+b") as file:
        file.seek(differing.offset)
        file.write(b"damage")
    with pytest.raises(TableFileError, match=f"{differing.file}: layer 3 block 2 .* checksum"):
        patch(damaged, new, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged", "patch"]


def test_a_shard_reads_only_blocks_with_rows_of_its_own(copy: Path, base: Path, base_held: LoadedModel) -> None:
    with PatchFiles.open(copy) as opened:
        victim = opened.blocks(3)[1]
        sizes = [(block.stop - block.start) * (8 + 33) for block in opened.blocks(3)]
    with (copy / victim.file).open("r+b") as file:
        file.seek(victim.rows_offset + 1)
        file.write(b"damage")
    for rows, read in (
        (range(victim.first_id), sizes[:1]),
        (range(victim.last_id + 1, 500), sizes[2:]),
        (range(20), []),
        (range(481, 500), []),
        (range(victim.first_id - 6, victim.first_id), []),
    ):
        seen: list[int] = []
        held = hold_patched(copy, hold(base, {3: rows}), seen.append)
        assert sorted(seen) == sorted(read)
        assert np.array_equal(gathered(held)[3], changed_rows()[3][rows.start : rows.stop])
    with pytest.raises(TableFileError, match=f"{victim.file}: layer 3 block 1 .* has checksum"):
        hold_patched(copy, base_held)


def test_a_patch_is_read_from_a_url_alike(patched: Path, base_held: LoadedModel) -> None:
    with http_files() as http:
        http.add(patched, "p")
        with open_any(Url(f"{http.url}/p")) as opened:
            assert isinstance(opened, PatchFiles)
            held = load_patched(opened, base_held, 2, threading.Event(), lambda _: None)
    assert all(np.array_equal(rows, changed_rows()[layer]) for layer, rows in gathered(held).items())


def test_a_stop_ends_loading(patched: Path, base_held: LoadedModel) -> None:
    stop = threading.Event()
    with pytest.raises(LoadCancelledError):
        hold_patched(patched, base_held, lambda _: stop.set(), stop)


# What no patch is made of.


def test_models_of_which_no_patch_can_be(base: Path, new: Path, patched: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other", ROWS, spec=replace(SPEC, name="other"))
    every = write(tmp_path / "every", {layer: rows ^ 1 for layer, rows in ROWS.items()})
    out = tmp_path / "out"
    for old, young, error, message in (
        (base, other, PatchError, f"{other} is not of the specification of {base}"),
        (base, every, PatchError, f"too many rows of {every} differ from {base}"),
        (patched, new, IsPatchError, f"{patched} is a patch of version '"),
        (base, patched, IsPatchError, f"{patched} is a patch of version '"),
        (base, tmp_path, TableFileError, "no packed model"),
    ):
        with pytest.raises(error, match=message):
            patch(old, young, out)
    with pytest.raises(OutputError, match="exists already"):
        patch(base, new, other)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["every", "other"]


@pytest.mark.parametrize(
    ("layer", "ids", "rows", "message"),
    [
        (3, np.array([1, 1], np.uint64), np.zeros((2, 33), np.uint8), "must ascend, each once, and be below 500"),
        (3, np.array([2, 1], np.uint64), np.zeros((2, 33), np.uint8), "must ascend"),
        (3, np.array([1, 500], np.uint64), np.zeros((2, 33), np.uint8), "must ascend"),
        (3, np.array([1], np.int64), np.zeros((1, 33), np.uint8), r"layer 3 takes ids uint64 .* these are int64 \[1\]"),
        (3, np.array([1], np.uint64), np.zeros((1, 32), np.uint8), r"uint8 \[n, 33\]; .* uint8 \[1, 32\]"),
        (3, np.array([1], np.uint64), np.zeros((2, 33), np.uint8), r"uint8 \[2, 33\]"),
        (3, np.array([1], np.uint64), np.zeros((1, 33), np.int8), "int8"),
        (3, np.array([], np.uint64), np.zeros((0, 33), np.uint8), "nothing to patch"),
        (4, np.array([1], np.uint64), np.zeros((1, 33), np.uint8), "no layer 4"),
    ],
)
def test_rows_that_cannot_be_are_refused(
    base: Path, tmp_path: Path, layer: int, ids: Any, rows: Any, message: str
) -> None:
    with PackedModel.open(base) as model, pytest.raises((PatchError, SpecError), match=message):
        write_patch(model, {layer: (ids, rows)}, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_patch_leaves_nothing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int, data: memoryview, offset: int) -> None:
        if offset > 4096:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("engrampool_server.files.patches.patch.write_at", fail)
    with PackedModel.open(base) as model, pytest.raises(OutputError, match="No space left"):
        write_patch(model, {3: (IDS[3], ROWS[3][IDS[3]])}, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# What no patch is loaded from, or onto.


def test_a_patch_is_no_model_and_fits_its_base_alone(
    base: Path, new: Path, patched: Path, base_held: LoadedModel, tmp_path: Path
) -> None:
    with pytest.raises(
        IsPatchError, match=rf"^{patched} is a patch of version '{base_held.version}', not a packed model"
    ):
        PackedModel.open(patched)
    with pytest.raises(TableFileError, match="no format 'engrampool-patch'"):
        PatchFiles.open(base)
    with pytest.raises(
        TableFileError, match=f"{patched} is a patch of version {base_held.version}, and cannot be laid"
    ):
        hold_patched(patched, hold(new))
    renamed = replace(base_held, spec=replace(SPEC, name="renamed"))
    with pytest.raises(TableFileError, match="cannot be laid over renamed"):
        hold_patched(patched, renamed)
    disguised = replace(hold_patched(patched, base_held), version=base_held.version)
    with pytest.raises(TableFileError, match="which is a patch"):
        hold_patched(patched, disguised)


def test_any_flipped_bit_and_any_other_length_is_found(copy: Path) -> None:
    whole_files = {path: path.read_bytes() for path in copy.iterdir()}

    @given(
        st.sampled_from(sorted(whole_files)),
        st.one_of(st.floats(0, 1, exclude_max=True), st.integers(0, 90)),
        st.integers(0, 7),
        st.sampled_from(["flip", "cut", "append"]),
    )
    def check(path: Path, where: float | int, bit: int, how: str) -> None:
        data = bytearray(whole_files[path])
        at = where if isinstance(where, int) else int(where * (len(data) - 1))  # the manifest ends with a line feed
        data[at] ^= 1 << bit
        path.write_bytes({"flip": data, "cut": data[:at], "append": whole_files[path] + b"\1"}[how])
        with pytest.raises(TableFileError, match=path.name):
            read_all(copy)
        path.write_bytes(whole_files[path])

    check()


def forge(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest, and make its version fit."""
    path = directory / "manifest.json"
    document = json.loads(path.read_text())
    change(document)
    tables = [{k: v for k, v in t.items() if k not in ("file", "data_offset")} for t in document["tables"]]
    document["version"] = digest({"base": document["base"], "spec": document["spec"], "tables": tables})
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(base="f" * 31), "no version"),
        (lambda d: d.update(base=7), "no version"),
        (lambda d: d.update(format_version=2), "format version 2; this program reads version 1"),
        (lambda d: d.update(more=1), "must have base, format"),
        (lambda d: d.update(tables=[]), r"changed layers out of \[3, 7\]"),
        (lambda d: d["tables"].reverse(), r"it lists \[7, 3\]"),
        (lambda d: d["tables"][0].update(layer=4), r"it lists \[4, 7\]"),
        (lambda d: d["tables"].append(d["tables"][1]), r"it lists \[3, 7, 7\]"),
        (lambda d: d["tables"][0].update(num_changed=0), "changes 0 of the 500 rows of layer_3"),
        (lambda d: d["tables"][0].update(num_changed=501), "changes 501 of"),
        (lambda d: d["tables"][0].update(num_changed=10), "for the 1 blocks"),
        (lambda d: d["tables"][0].update(block_rows=0), "blocks of 0 rows"),
        (lambda d: d["tables"][0].update(block_rows=2**40), "a block is at most"),
        (lambda d: d["tables"][0].update(other=1), "other fields"),
        (lambda d: d["tables"][0].update(first_ids=None), "other fields"),
        (lambda d: d["tables"][0]["checksums"].pop(), "for the 3 blocks"),
        (lambda d: d["tables"][0]["checksums"].__setitem__(0, "x"), "16 hexadecimal digits"),
        (lambda d: d["tables"][0]["last_ids"].__setitem__(0, 10.5), "no row or byte counts"),
        (lambda d: d["tables"][0]["last_ids"].__setitem__(-1, 500), "block 2 of layer_3 .* be below 500"),
        (lambda d: d["tables"][0]["last_ids"].__setitem__(0, 22), r"24 rows of the ids 20 \.\. 22"),
        (lambda d: d["tables"][0]["first_ids"].__setitem__(1, 20), "must ascend from block to block"),
        (lambda d: d["tables"][1].update(file=d["tables"][0]["file"]), "names a file twice"),
        (lambda d: d["tables"][1].update(file="../x.safetensors"), "names a file"),
        (lambda d: d["tables"][1].update(data_offset=4104), "layer_7-changed.safetensors holds"),
        (lambda d: d["spec"]["tables"][0].update(num_rows="a"), "no valid specification"),
        (lambda d: d["spec"]["tables"][0].update(num_rows=500.0), "no valid specification"),
    ],
)
def test_a_forged_manifest_is_refused(copy: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    forge(copy, change)
    with pytest.raises(TableFileError, match=message) as caught:
        PatchFiles.open(copy)
    assert str(copy) in str(caught.value)


@pytest.mark.parametrize("ids", [{5: 55, 6: 54}, {5: 62}, {0: 19}, {23: 182}])
def test_ids_that_are_not_what_the_manifest_says_are_refused(copy: Path, ids: dict[int, int]) -> None:
    """Two exchanged, one twice, another first and another last one: the checksum made to fit."""
    path = copy / "layer_3-changed.safetensors"
    data = bytearray(path.read_bytes())
    with PatchFiles.open(copy) as opened:
        block = opened.blocks(3)[0]
    stored = np.frombuffer(data, np.uint64, 24, block.ids_offset)
    for at, value in ids.items():
        stored[at] = value
    path.write_bytes(data)
    ends = block.ids_offset + 24 * 8, block.rows_offset + 24 * 33
    checksum = xxhash.xxh3_64_hexdigest(data[block.ids_offset : ends[0]] + data[block.rows_offset : ends[1]])
    forge(copy, lambda d: d["tables"][0]["checksums"].__setitem__(0, checksum))
    with pytest.raises(
        TableFileError, match=rf"{path}: layer 3 block 0 \(changed rows 20 .. 181\) has ids that do not"
    ):
        read_all(copy)


def test_a_wrong_buffer_is_refused(patched: Path) -> None:
    with PatchFiles.open(patched) as opened:
        block = opened.blocks(3)[0]
        rows = np.empty((24, 33), np.uint8)
        for ids, out in (
            (np.empty(23, np.uint64), rows),
            (np.empty(24, np.int64), rows),
            (np.empty(24, np.uint64), rows.T),
        ):
            with pytest.raises(ValueError, match="C-contiguous"):
                opened.read_block(block, ids, out)


# Commands.


@pytest.fixture
def run() -> Iterator[Callable[..., str]]:
    def call(name: str, *arguments: object) -> str:
        result = CliRunner().invoke(getattr(commands, name), [str(argument) for argument in arguments])
        if result.exception:
            raise result.exception
        return result.stdout

    return call


def test_patch_inspect_and_verify(run: Callable[..., str], base: Path, new: Path, copy: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = run("patch", base, new, "--out", out, "--quiet")
    version = said.split()[-1]
    assert said == f"wrote {out}, version {version}\n"
    assert run("verify", out, "--quiet") == f"{out} is whole: 2 blocks, version {version}\n"
    facts = json.loads(run("inspect", out, "--json"))
    with PackedModel.open(base) as model:
        assert (facts["name"], facts["version"], facts["base"]) == ("patched", version, model.version)
    assert facts["nbytes"] == 66 * (8 + 33) + 70 * (8 + 7)
    assert [(t["layer"], t["num_changed"], t["num_rows"]) for t in facts["tables"]] == [(3, 66, 500), (7, 70, 300)]
    text = run("inspect", out)
    for fact in (version, facts["base"], "layer 3", "66 of 500 rows", "70 of 300 rows"):
        assert fact in text
    with PatchFiles.open(copy) as opened:
        block = opened.blocks(7)[1]
    with (copy / block.file).open("r+b") as file:
        file.seek(block.rows_offset + 1)
        file.write(b"damage")
    with pytest.raises(TableFileError, match=f"{copy}: 1 of 5 blocks are damaged; do not serve it"):
        run("verify", copy, "--quiet")
