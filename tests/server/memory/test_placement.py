"""Servers that hold a part of a model: which one, loaded how, and what they answer and refuse."""

import gc
import json
import shutil
import threading
from pathlib import Path

import grpc
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engrampool_proto import wire
from engrampool_proto.errors import SpecError
from engrampool_proto.hashing import TokenBatch
from engrampool_proto.segment import read_trailer
from engrampool_proto.sharding import Part, cut, part_nbytes, placement_json, whole
from engrampool_proto.v1 import pool_pb2
from engrampool_server.commands.plan import plan
from engrampool_server.config import ServerConfig
from engrampool_server.files.pack import pack as pack_checkpoint
from engrampool_server.files.raw_model import RawModel
from engrampool_server.files.table_files import PackedModel, TableFileError
from engrampool_server.machine import Machine
from engrampool_server.memory.load import ModelLoader
from engrampool_server.memory.placement import ShardError, part_of
from engrampool_server.memory.preflight import OVERHEAD_BYTES, PreflightError
from engrampool_server.memory.segments import Backing, file_name, find_backing, survey, sweep
from engrampool_server.memory.table_loader import identities, load
from engrampool_server.memory.tables import LoadedModel
from engrampool_server.telemetry.metrics import Metrics
from server_fixtures import SPEC, RawPool, change_byte, expected, joined, pack, refusal, rows_of, running, version_of

BLOCK_BYTES = 100_000  # 378 rows of layer 2, 2380 of layer 9


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("shards") / "small", block_bytes=BLOCK_BYTES)


def load_part(directory: Path, part: Part | None, memory: str = "anon", progress=lambda _: None) -> LoadedModel:
    with PackedModel.open(directory) as model:
        return load(model, memory, False, 2, threading.Event(), progress, "off", part)


def holds(held: LoadedModel, part: Part) -> bool:
    return {layer: range(table.row_start, table.row_stop) for layer, table in held.tables.items()} == part and all(
        table.rows.tobytes() == expected(layer, part[layer]) for layer, table in held.tables.items()
    )


def backing(directory: Path) -> Backing:
    found = find_backing(f"file:{directory}")
    assert found is not None
    return found


# --- which part


def config(**values) -> ServerConfig:
    return ServerConfig(models=(Path("/m"),), **values)


def test_settings_say_which_part(tmp_path):
    assert part_of(SPEC, config()) == whole(SPEC)
    for by in ("head", "row", "layer"):
        assert [part_of(SPEC, config(shard=f"{at}/2", shard_by=by)) for at in (0, 1)] == list(cut(SPEC, 2, by))
    file = tmp_path / "placement.json"
    named = {"east": cut(SPEC, 2)[0], "west": cut(SPEC, 2)[1]}
    file.write_text(json.dumps({"other": {}, **placement_json(SPEC, named)}))
    assert {name: part_of(SPEC, config(shard=name, placement=str(file))) for name in named} == named
    with pytest.raises(ShardError, match=f"{file} has no shard north of small; it has east, west"):
        part_of(SPEC, config(shard="north", placement=str(file)))
    with pytest.raises(SpecError, match="small has 2 layers, too few for 3 shards by layer"):
        part_of(SPEC, config(shard="0/3", shard_by="layer"))


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        (None, ShardError, "cannot read"),
        ("{", ShardError, "is not JSON"),
        ("[" * 100_000, ShardError, "is not JSON"),
        ('{"small": {"a": {"2": [0, 6500]}}}', SpecError, "layer_9: no server holds rows 0 .. 4099"),
    ],
)
def test_a_placement_that_cannot_be_used_says_why(tmp_path, text, error, says):
    file = tmp_path / "placement.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(error, match=says) as caught:
        part_of(SPEC, config(shard="a", placement=str(file)))
    assert str(file) in str(caught.value)


# --- loading


def ranges(layer: int) -> st.SearchStrategy[range]:
    rows = SPEC.table(layer).num_rows
    edges = [0, 1, 377, 378, 379, 756, 2380, 2381, rows - 1, rows]
    bound = st.sampled_from([edge for edge in edges if edge <= rows]) | st.integers(0, rows)
    return st.tuples(bound, bound).map(lambda two: range(min(two), max(two)))


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(wide=ranges(2), narrow=ranges(9), memory=st.sampled_from(["anon", "file"]))
def test_any_part_is_held_and_only_blocks_with_rows_of_it_are_read(packed, tmp_path_factory, wide, narrow, memory):
    part = {layer: rows for layer, rows in ((2, wide), (9, narrow)) if rows}
    directory = tmp_path_factory.mktemp("held")
    read, done = [], []
    read_block = PackedModel.read_block

    def count(self, block, out):
        read.append((block.layer, block.index))
        read_block(self, block, out)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedModel, "read_block", count)
        held = load_part(packed, part, "anon" if memory == "anon" else f"file:{directory}", done.append)
    assert holds(held, part)
    assert sum(done) == part_nbytes(SPEC, part)
    with PackedModel.open(packed) as model:
        wanted = [
            (layer, block.index)
            for layer, rows in part.items()
            for block in model.blocks(layer)
            if block.start < rows.stop and block.stop > rows.start
        ]
    assert sorted(read) == wanted


def test_a_damaged_row_that_is_not_held_is_found_in_a_block_of_which_rows_are(packed, tmp_path):
    target = tmp_path / "damaged"
    target.mkdir()
    for path in packed.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    with PackedModel.open(packed) as model:
        block = model.blocks(2)[3]
    change_byte(target / block.file, block.offset)  # of the block's first row
    part = {2: range(block.start + 1, block.stop + 5)}
    with pytest.raises(TableFileError, match=r"layer 2 block 3 .* checksum"):
        load_part(target, part)
    part = {2: range(block.stop, 6500), 9: range(4100)}
    assert holds(load_part(target, part), part)


# --- segments of parts

PARTS = cut(SPEC, 4, "row")


def test_each_part_is_a_segment_of_its_own_that_the_next_start_adopts(packed, tmp_path, events):
    for part in PARTS:
        assert holds(load_part(packed, part, f"file:{tmp_path}"), part)
    assert events.lines == []
    with PackedModel.open(packed) as model:
        wanted = [identity for part in PARTS for identity in identities(model, part)]
    assert {path.name for path in tmp_path.iterdir()} == {file_name(identity) for identity in wanted}
    assert len(wanted) == 5  # one part is of both tables
    for identity in wanted:
        assert read_trailer((tmp_path / file_name(identity)).read_bytes()[-4096:]) == identity
    gc.collect()
    done = []
    assert holds(load_part(packed, PARTS[1], f"file:{tmp_path}", done.append), PARTS[1])
    assert sum(done) == part_nbytes(SPEC, PARTS[1])
    assert len(events.of("adopted")) == len(PARTS[1])
    # A table that is whole is one segment, whatever is held beside it.
    events.lines.clear()
    assert holds(load_part(packed, None, f"file:{tmp_path}"), whole(SPEC))
    assert [fields["layer"] for fields in events.of("adopted")] == [9]
    assert len(list(tmp_path.iterdir())) == 6


@pytest.mark.parametrize("at", [0, -1])
@pytest.mark.parametrize("rows", [range(5, 100), range(300, 3000)])
def test_damage_at_either_end_of_a_part_is_noticed(packed, tmp_path, events, at, rows):
    part = {2: rows}
    load_part(packed, part, f"file:{tmp_path}")
    gc.collect()
    (path,) = tmp_path.iterdir()
    change_byte(path, 0 if at == 0 else len(rows) * 264 - 1)
    assert holds(load_part(packed, part, f"file:{tmp_path}"), part)
    assert [fields["reason"] for fields in events.of("freed")] == ["damaged"]
    assert events.of("adopted") == []


def test_a_sweep_leaves_other_parts_of_the_version_and_frees_those_of_others(packed, tmp_path, events):
    other = pack(tmp_path / "other", change=True, block_bytes=BLOCK_BYTES)
    where = tmp_path / "held"
    where.mkdir()
    load_part(packed, PARTS[0], f"file:{where}")
    load_part(packed, PARTS[1], f"file:{where}")
    load_part(other, PARTS[0], f"file:{where}")
    gc.collect()
    # Of a time before there were shards.
    old = where / f"engrampool-{backing_uid(where)}-{version_of(packed)[:16]}-2"
    old.write_bytes(b"x" * 10_000)
    with PackedModel.open(packed) as model:
        wanted = identities(model, PARTS[1])
        left = sweep(backing(where), wanted)
        assert {found.identity for found in left} == {*identities(model, PARTS[0]), *wanted}
    assert sorted(fields["reason"] for fields in events.of("freed")) == ["other version", "partial"]
    assert not old.exists()


def backing_uid(directory: Path) -> str:
    return next(directory.iterdir()).name.split("-")[1]


def test_a_part_that_is_not_wanted_makes_room_where_there_is_none(packed, tmp_path, monkeypatch, events):
    where = tmp_path / "held"
    where.mkdir()
    load_part(packed, PARTS[0], f"file:{where}")
    gc.collect()
    (before,) = where.iterdir()
    read = Machine.read
    size = part_nbytes(SPEC, PARTS[1])

    def little(**options):
        free = size + 100_000 - sum(path.stat().st_blocks * 512 for path in where.iterdir())
        machine = read(**options)
        object.__setattr__(machine, "directory_available_bytes", free)
        return machine

    monkeypatch.setattr(Machine, "read", little)
    models = ModelLoader(ServerConfig(models=(packed,), memory=f"file:{where}", shard="1/4", shard_by="row"), Metrics())
    models.open()
    models.close()
    assert not before.exists()
    assert [fields["reason"] for fields in events.of("freed")] == ["room"]


def test_preflight_and_metrics_count_the_part_only(packed, monkeypatch):
    read = Machine.read
    parts = cut(SPEC, 2)
    # Enough for either half, and not for both.
    room = max(part_nbytes(SPEC, part) for part in parts) * (1 + 2 / 512) + OVERHEAD_BYTES + (64 << 20)
    enough = SPEC.nbytes * (1 + 2 / 512) + OVERHEAD_BYTES + (64 << 20)
    assert room < enough

    def little(**options):
        machine = read(**options)
        object.__setattr__(machine, "mem_available_bytes", int(room) + 100_000)
        return machine

    monkeypatch.setattr(Machine, "read", little)
    settings = {"models": (packed,), "max_in_flight_bytes": 64 << 20, "max_answer_bytes": 1 << 20}
    for at, part in enumerate(parts):
        metrics = Metrics()
        models = ModelLoader(ServerConfig(shard=f"{at}/2", **settings), metrics)
        models.open()
        (held,) = models.load(threading.Event())
        models.close()
        assert holds(held, part)
        nbytes = part_nbytes(SPEC, part)
        sample = metrics.registry.get_sample_value
        assert sample("engrampool_to_load_bytes") == sample("engrampool_loaded_bytes_total") == nbytes
        for layer in (2, 9):
            rows = len(part[layer]) if layer in part else None
            assert sample("engrampool_table_rows", {"model": "small", "layer": str(layer)}) == rows
    models = ModelLoader(ServerConfig(**settings), Metrics())
    with pytest.raises(PreflightError, match="host memory"):
        models.open()
    models.close()


# --- checkpoints


@pytest.mark.parametrize("memory", ["anon", "file"])
def test_of_a_checkpoint_all_is_read_and_the_part_held(checkpoint, tmp_path, memory):
    directory = checkpoint("deepseek-v4.1")
    version = pack_checkpoint(directory, tmp_path / "packed", block_bytes=5000)
    everything = load_part(tmp_path / "packed", None)
    (tmp_path / "held").mkdir()
    kind = "anon" if memory == "anon" else f"file:{tmp_path / 'held'}"
    parts = cut(everything.spec, 3)
    assert any(len(part) < len(everything.tables) for part in parts)
    for part in parts:
        raw, done = RawModel(directory, 5000), []
        held = load(raw, kind, False, 2, threading.Event(), done.append, "off", part)
        raw.close()
        assert held.version == version
        assert list(held.tables) == list(part)
        for layer, table in held.tables.items():
            rows = part[layer]
            assert np.array_equal(table.rows, everything.tables[layer].rows[rows.start : rows.stop])
        assert sum(done) == part_nbytes(held.spec, part)
        assert survey(backing(tmp_path / "held")) == []


def test_it_is_said_that_all_of_a_checkpoint_is_read(checkpoint, events):
    for shard, warned in (("all", 0), ("0/1", 0), ("1/2", 1)):
        events.lines.clear()
        directory = checkpoint("longcat")
        models = ModelLoader(ServerConfig(models=(directory,), shard=shard), Metrics())
        models.open()
        models.close()
        warnings = [fields["warning"] for fields in events.of("preflight")]
        assert sum("all is read at every start" in warning for warning in warnings) == warned
        assert [fields["shard"] for fields in events.of("opened")] == [shard]
        shutil.rmtree(directory)


# --- answers

# The cut is within layer 2; layer 9 is whole in the second half.
HALVES = cut(SPEC, 2)


def batch() -> TokenBatch:
    return TokenBatch(np.arange(40, dtype=np.int32), np.array([0, 40], np.int32), np.empty((1, 0), np.int32))


def test_the_union_of_all_parts_is_the_model(packed):
    stop = HALVES[0][2].stop
    assert [*HALVES] == [{2: range(stop)}, {2: range(stop, 6500), 9: range(4100)}]
    for at, part in enumerate(HALVES):
        with running(packed, shard=f"{at}/2") as run, RawPool(run.address, version_of(packed)) as pool:
            for layer, rows in part.items():
                for dtype in (np.uint32, np.uint64):
                    asked = pool.by_ids((layer, rows), dtype=dtype)
                    assert rows_of(pool.lookup(asked)) == joined(pool.stream(asked)) == {layer: expected(layer, rows)}


def test_rows_and_layers_that_are_elsewhere_are_refused(packed):
    stop = HALVES[0][2].stop
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    with running(packed, shard="0/2") as run, RawPool(run.address, version_of(packed)) as pool:
        for call in (pool.lookup, pool.stream):
            assert refusal(lambda call=call: call(pool.by_ids((2, [0, stop - 1, stop])))) == (
                invalid,
                "not-held",
                f"row id {stop} at position 2 of layer 2 is out of range; this server holds rows 0 .. {stop - 1}",
            )
            for ids in ([0], []):
                assert refusal(lambda call=call, ids=ids: call(pool.by_ids((9, ids)))) == (
                    invalid,
                    "unknown-layer",
                    f"this server holds no rows of layer 9 of small; it holds rows 0 .. {stop - 1} of layer 2",
                )
            code, reason, text = refusal(lambda call=call: call(pool.by_ids((3, [0]))))
            assert (code, reason, text) == (invalid, "unknown-layer", "model small has no layer 3; it has 2, 9")
        # A refusal does not end what is good.
        assert rows_of(pool.lookup(pool.by_ids((2, [7])))) == {2: expected(2, [7])}


def test_tokens_are_looked_up_in_whole_layers_only(packed):
    ids = SPEC.hash(batch(), [9])[9]
    with running(packed, shard="1/2") as run, RawPool(run.address, version_of(packed)) as pool:
        assert rows_of(pool.lookup(pool.by_tokens(batch(), 9))) == {9: expected(9, ids.reshape(-1))}
        for layers in ((), (2,), (2, 9)):
            for call in (pool.lookup, pool.stream):
                code, reason, text = refusal(lambda call=call, layers=layers: call(pool.by_tokens(batch(), *layers)))
                assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "partial-model")
                assert "may be any of layer 2: hash the tokens and ask for rows by id" in text
                assert "all of layer 9" in text
        code, reason, _ = refusal(lambda: pool.lookup(pool.by_tokens(batch(), 3)))
        assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "unknown-layer")
    with running(packed, shard="0/2") as run, RawPool(run.address, version_of(packed)) as pool:
        code, reason, _ = refusal(lambda: pool.lookup(pool.by_tokens(batch(), 9)))
        assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "partial-model")
    with running(packed, shard="0/1") as run, RawPool(run.address, version_of(packed)) as pool:
        assert list(rows_of(pool.lookup(pool.by_tokens(batch())))) == [2, 9]


def call(address: str, method: str, request, answer):
    with RawPool(address) as pool:
        raw = pool.channel.unary_unary(f"/{wire.SERVICE}/{method}")(request.SerializeToString())
    return answer.FromString(raw)


@pytest.mark.parametrize("at", [0, 1])
def test_describe_and_attach_state_the_part(packed, tmp_path, at):
    with running(packed, shard=f"{at}/2", memory=f"file:{tmp_path}") as run:
        described = call(
            run.address, "Describe", pool_pb2.DescribeRequest(include_spec=True), pool_pb2.DescribeResponse
        )
        (model,) = described.models
        assert (model.version, model.spec_digest) == (version_of(packed), SPEC.digest)
        stated = {table.layer: (table.num_rows, table.row_start, table.row_stop) for table in model.tables}
        rows = {layer: HALVES[at].get(layer, range(0)) for layer in (2, 9)}
        assert stated == {layer: (SPEC.table(layer).num_rows, rows[layer].start, rows[layer].stop) for layer in (2, 9)}
        request = pool_pb2.AttachRequest(model="small", version=model.version)
        offered = call(run.address, "Attach", request, pool_pb2.AttachResponse)
        assert {table.layer: range(table.row_start, table.row_stop) for table in offered.tables} == HALVES[at]
        for table in offered.tables:
            nbytes = len(HALVES[at][table.layer]) * SPEC.table(table.layer).row_bytes
            assert Path(table.path).read_bytes()[:nbytes] == expected(table.layer, HALVES[at][table.layer])


# --- plan


def planned(*arguments) -> str:
    result = CliRunner().invoke(plan, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def test_plan_states_what_each_server_holds_and_needs(packed, tmp_path):
    document = json.loads(planned(packed, "--shards", 2, "--replicas", 3, "--workers", 2, "--json"))
    assert [
        {table["layer"]: range(table["row_start"], table["row_stop"]) for table in shard["tables"]}
        for shard in document["shards"]
    ] == list(HALVES)
    assert [shard["shard"] for shard in document["shards"]] == ["0/2", "1/2"]
    assert sum(shard["nbytes"] for shard in document["shards"]) == document["nbytes"] == SPEC.nbytes
    for shard in document["shards"]:
        # As OPERATIONS.md has it: rows, processes, answers, and page tables of two workers and the supervisor.
        beside = OVERHEAD_BYTES + (64 << 20) + (1 << 30)
        assert shard["memory_bytes"] == shard["nbytes"] + beside + 3 * (shard["nbytes"] // 512)
    assert document["servers"] == 6
    assert document["memory_bytes"] == 3 * sum(shard["memory_bytes"] for shard in document["shards"])
    # Its placement is one that serves.
    file = tmp_path / "placement.json"
    file.write_text(json.dumps(document["placement"]))
    assert part_of(SPEC, config(shard="1-of-2", placement=str(file))) == HALVES[1]
    again = json.loads(planned(packed, "--placement", file, "--json"))
    assert again["placement"] == document["placement"]
    assert [shard["shard"] for shard in again["shards"]] == ["0-of-2", "1-of-2"]


def test_plan_for_people(packed):
    lines = planned(packed, "--shards", 2, "--shard-by", "row", "--replicas", 2).splitlines()
    assert lines[0] == "small: 1.9 MiB of rows; each server: serve --shard-by row"
    assert lines[1].startswith("--shard 0/2: 1.0 MiB of rows, 1.000 of an equal share; memory 1.7 GiB")
    assert lines[2].startswith("    layer_2: rows 0 .. ")
    assert lines[2].endswith("heads 0 .. 3 of 6, not all of their rows")
    assert lines[-2] == "2 shards x 2: 4 servers, 6.8 GiB of memory in all"


def test_plan_needs_no_tables_of_a_checkpoint(checkpoint):
    directory = checkpoint("longcat")
    with_tables = planned(directory, "--shards", 3)
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    assert planned(directory, "--shards", 3) == with_tables
    assert "--shard 2/3" in with_tables


def test_plan_says_what_cannot_be(packed, tmp_path):
    with pytest.raises(SpecError, match="small has 8 heads, too few for 9 shards by head"):
        planned(packed, "--shards", 9)
    assert "give it or --shards" in planned(packed, "--shards", 2, "--placement", tmp_path / "p")
    assert "allowed: 1KiB..1TiB" in planned(packed, "--max-in-flight-bytes", "lots")
