"""Models in object stores: the same bytes, whatever happens to the line, and only the bytes that are needed."""

import json
import os
import shutil
import sys
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from engrampool_proto.cli import main
from engrampool_server.config import ConfigError, load_config, render
from engrampool_server.files import sources
from engrampool_server.files.sources import SourceError, Url, open_source, parse_location, redact, split_locations
from engrampool_server.files.synth import fill_rows, synthetic_model
from engrampool_server.files.table_files import PackedModel, TableFileError
from engrampool_server.files.table_writer import write_tables
from engrampool_server.files.verify import damaged_blocks
from engrampool_server.memory.table_loader import load
from engrampool_server.memory.tables import LoadedModel
from stores import S3, HttpFiles, http_files, line_to, s3_server

SECRET = "topsecret"


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """Two tables of 276 rows of 512 bytes, each in two files of two blocks."""
    spec = synthetic_model("longcat", 10, name="tiny").spec
    spec = replace(spec, tables=tuple(replace(spec.tables[0], layer=layer) for layer in (1, 15)))
    directory = tmp_path_factory.mktemp("sources") / "model"
    write_tables(directory, spec, {}, fill_rows, file_bytes=100_000, block_bytes=40_000)
    return directory


@pytest.fixture(scope="module")
def endpoint(packed: Path) -> Iterator[S3]:
    with s3_server() as server:
        server.upload(packed, "tables/deep/tiny")
        yield server


@pytest.fixture
def s3(endpoint: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    for name in [name for name in os.environ if name.startswith(("AWS_", "AZURE_", "GOOGLE_"))]:
        monkeypatch.delenv(name)
    for name, value in endpoint.environ.items():
        monkeypatch.setenv(name, value)
    return endpoint


@pytest.fixture(params=[True, False], ids=["e-tags", "no e-tags"])
def http(packed: Path, request: pytest.FixtureRequest) -> Iterator[HttpFiles]:
    with http_files(request.param) as files:
        files.add(packed, "m")
        yield files


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PATIENCE_S", 0.3)
    monkeypatch.setattr(sources, "OPEN_PATIENCE_S", 0.3)
    monkeypatch.setattr(sources, "RETRY", {"max_retries": 0})


def load_all(where: Path | Url, part=None) -> LoadedModel:
    with PackedModel.open(where) as model:
        return load(model, "anon", False, 2, threading.Event(), lambda _: None, part=part)


def assert_equal(found: LoadedModel, packed: Path) -> None:
    wanted = load_all(packed)
    assert found.version == wanted.version
    for layer, table in wanted.tables.items():
        assert np.array_equal(found.tables[layer].rows, table.rows)


def read_block(model: PackedModel, layer: int, index: int) -> None:
    block = model.blocks(layer)[index]
    model.read_block(block, np.empty((block.stop - block.start, model.spec.table(layer).row_bytes), np.uint8))


# What a location is.


@pytest.mark.parametrize(
    ("text", "location"),
    [
        ("models/a", Path("models/a")),
        ("s3://bucket/a/b/", Url("s3://bucket/a/b")),
        ("gs://bucket", Url("gs://bucket")),
        ("https://[::1]:8443/a%20b", Url("https://[::1]:8443/a%20b")),
        ("file:///models/a%20b", Path("/models/a b")),
        ("file://localhost/a", Path("/a")),
    ],
)
def test_text_becomes_a_path_or_a_url(text, location):
    assert parse_location(text) == location


@pytest.mark.parametrize(
    "text",
    [
        f"https://user:{SECRET}@host/m",
        f"https://host/m?sig={SECRET}",
        f"s3://{SECRET}@bucket/m",
        "https://host/m#a",
        "s3://",
        "s3:///m",
        "ftp://host/m",
        "file://host/m",
        "http://[::1/m",
    ],
)
def test_urls_that_say_too_much_or_too_little_are_refused_without_telling(text, monkeypatch, capsys):
    with pytest.raises(ValueError, match=r"not a URL|file:|Invalid IPv6"):
        parse_location(text)
    for flags, environ in (({"models": (text, text)}, {}), ({}, {"ENGRAMPOOL_MODELS": text})):
        with pytest.raises(
            ConfigError, match=r"models: .* not allowed.*https.*without user, password and query"
        ) as caught:
            load_config(flags, environ, None)
        assert SECRET not in str(caught.value)
    with pytest.raises(ConfigError, match=r"ENGRAMPOOL_MODEL;") as caught:
        load_config({}, {"ENGRAMPOOL_MODEL": text}, None)
    assert SECRET not in str(caught.value)
    monkeypatch.setattr(sys, "argv", ["engrampool", "verify", text])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert SECRET not in capsys.readouterr().err


def test_settings_keep_urls_and_say_them_again(tmp_path):
    given = ["s3://bucket/a", "/b", "http://127.0.0.1:9000/c"]
    resolved = load_config({}, {"ENGRAMPOOL_MODELS": ":".join(given)}, None)
    assert resolved.config.models == (Url(given[0]), Path("/b"), Url(given[2]))
    (tmp_path / "again.toml").write_text(render(resolved))
    assert load_config({}, {}, tmp_path / "again.toml").config == resolved.config


@pytest.mark.parametrize(
    "entries",
    [
        ["/a", "/b"],
        [""],
        ["", "/a", ""],
        ["s3://a/b", "s3://c"],
        ["http://h:80/x", "rel", "https://[::1]:9/y", "gs://b"],
        [f"http://user:{SECRET}@h:80/x", "/a"],
    ],
)
def test_lists_are_separated_by_colons_that_are_of_no_url(entries):
    assert split_locations(":".join(entries)) == entries


def test_what_is_secret_in_a_text_is_left_out():
    text = "['https://u:p@h/x?sig=1', 's3://b', 'a?b'] https://h/?k=v, and why?"
    assert redact(text) == "['https://***@h/x?***', 's3://b', 'a?***'] https://h/?*** and why?***"
    assert redact("what? nothing") == "what? nothing"


# Reading.


def test_s3_gives_what_the_directory_gives(s3, packed):
    assert_equal(load_all(Url("s3://tables/deep/tiny")), packed)


def test_http_gives_what_the_directory_gives(http, packed):
    assert_equal(load_all(Url(f"{http.url}/m")), packed)


def test_no_credentials_are_needed_where_none_are_asked_for(s3, packed, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    assert_equal(load_all(Url("s3://tables/deep/tiny")), packed)


def test_azure_and_google_are_asked_for_the_right_objects(packed, monkeypatch):
    with http_files() as files:
        files.add(packed, "account/container/deep/m")
        files.add(packed, "bucket/deep/m")
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
        monkeypatch.setenv("AZURE_STORAGE_SAS_KEY", f"sig={SECRET}")
        monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", f"{files.url}/account")
        key = {
            "gcs_base_url": files.url,
            "disable_oauth": True,
            "client_email": "",
            "private_key": "",
            "private_key_id": "",
        }
        monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps(key))
        assert_equal(load_all(Url("az://container/deep/m")), packed)
        assert f"sig={SECRET}" in files.queries
        assert_equal(load_all(Url("gs://bucket/deep/m")), packed)
        # The signature is in every request, and in what obstore says about it.
        files.faults["account/container/deep/m/manifest.json"] = deque([403])
        with pytest.raises(TableFileError, match=r"manifest.json cannot be read: 403 Forbidden, Busy") as caught:
            PackedModel.open(Url("az://container/deep/m"))
        assert SECRET not in str(caught.value)


def test_only_the_ranges_of_the_rows_asked_for_are_read(http, packed):
    with PackedModel.open(packed) as model:
        blocks = model.blocks(15)
    wanted = blocks[1:3]  # the last of one file, the first of the next
    assert wanted[0].file != wanted[1].file
    part = {15: range(wanted[0].start + 3, wanted[1].stop - 3)}
    found = load_all(Url(f"{http.url}/m"), part)
    row_bytes = found.spec.table(15).row_bytes
    asked = []
    for name in http.files:
        asked += [(name, *one) for one in http.gets(name) if one[0] >= 4096]
    assert sorted(asked) == sorted(
        (f"m/{block.file}", block.offset, block.offset + (block.stop - block.start) * row_bytes) for block in wanted
    )
    rows = load_all(packed).tables[15].rows
    assert np.array_equal(found.tables[15].rows, rows[part[15].start : part[15].stop])


def test_inspect_reads_no_rows_and_verify_all_of_them(http, packed, monkeypatch, capsys):
    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["engrampool", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        return capsys.readouterr().out

    assert run("inspect", f"{http.url}/m") == run("inspect", str(packed))
    assert not [one for one in http.asked if one[2] >= 4096]
    assert run("verify", f"{http.url}/m").startswith(f"{http.url}/m is whole: 8 blocks, version ")
    with PackedModel.open(packed) as model:
        assert sum(stop - start for _, _, start, stop in http.asked if start >= 4096) == model.spec.nbytes


# What goes wrong.


def test_a_missing_bucket_key_or_permission_is_said(s3, packed, tmp_path):
    with pytest.raises(TableFileError, match=r"s3://nowhere/m is no packed model: .*\(404 Not Found, NoSuchBucket\)"):
        PackedModel.open(Url("s3://nowhere/m"))
    with pytest.raises(TableFileError, match=r"s3://tables/m is no packed model: .*\(404 Not Found, NoSuchKey\)"):
        PackedModel.open(Url("s3://tables/m"))
    shutil.copytree(packed, tmp_path / "lacking")
    victim = min((tmp_path / "lacking").glob("layer_15-*"))
    victim.unlink()
    s3.upload(tmp_path / "lacking", "lacking/m")
    with pytest.raises(TableFileError, match=rf"s3://lacking/m/{victim.name}, with layer_15, cannot be opened: 404"):
        PackedModel.open(Url("s3://lacking/m"))
    with (
        s3.refusing(),
        pytest.raises(TableFileError, match=r"manifest\.json cannot be read: 403 Forbidden") as caught,
    ):
        PackedModel.open(Url("s3://tables/deep/tiny"))
    assert SECRET not in str(caught.value)


def test_a_truncated_object_is_found_before_rows_are_read(s3, packed, tmp_path):
    shutil.copytree(packed, tmp_path / "short")
    victim = min((tmp_path / "short").glob("*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-1])
    s3.upload(tmp_path / "short", "short/m")
    with pytest.raises(TableFileError, match=rf"short/m/{victim.name} is .* its tensors end at .*: it is truncated"):
        PackedModel.open(Url("s3://short/m"))


def test_a_directory_that_was_not_finished_is_refused(http):
    http.files |= {f"m.partial/{name.split('/')[1]}": raw for name, raw in http.files.items()}
    PackedModel.open(Url(f"{http.url}/m.partial")).close()
    http.files["m.partial/journal.json"] = b"{}"
    with pytest.raises(TableFileError, match=r"m\.partial was not finished"):
        PackedModel.open(Url(f"{http.url}/m.partial"))


@pytest.mark.usefixtures("impatient")
def test_a_store_that_is_not_there_is_said(s3, monkeypatch):
    with line_to(s3.endpoint) as line:
        line.cut()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{line.address}")
        with pytest.raises(TableFileError, match=r"s3://tables/deep/tiny/manifest.json cannot be read: .*error"):
            PackedModel.open(Url("s3://tables/deep/tiny"))


def test_a_line_that_is_cut_again_and_again_costs_no_byte(s3, packed, monkeypatch):
    """The cuts fall within bodies, within headers and between requests."""
    with line_to(s3.endpoint) as line:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{line.address}")
        line.cuts.extend([100, 2_000, 5_000, 30_000, 1, 50_000, 15_000, 2_000])
        assert_equal(load_all(Url("s3://tables/deep/tiny")), packed)
        assert line.counts["cuts"] == 8


def test_an_answer_that_breaks_off_goes_on_where_it_did(http, monkeypatch):
    """Also where no e-tag says that the rest is of the same file: the checksum does."""
    monkeypatch.setattr(sources, "CHUNK_BYTES", 1)
    with PackedModel.open(Url(f"{http.url}/m")) as model:
        block = model.blocks(1)[1]
        name = f"m/{block.file}"
        http.faults[name] = deque([lambda body: body[:30_000], lambda body: body[:10], 503, lambda body: b""])
        http.asked.clear()
        read_block(model, 1, 1)
    end = block.offset + (block.stop - block.start) * 512
    ranges = http.gets(name)
    assert ranges[:3] == [(block.offset, end), (block.offset + 30_000, end), (block.offset + 30_010, end)]
    assert ranges[-1] == (block.offset + 30_010, end)
    assert not http.faults[name]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("fault", [503, lambda body: body[:0]], ids=["busy", "cut"])
def test_what_does_not_come_in_time_is_an_error(http, fault):
    with PackedModel.open(Url(f"{http.url}/m")) as model:
        block = model.blocks(1)[1]
        http.faults[f"m/{block.file}"] = deque([fault] * 1000)
        name = rf"m/{block.file}: layer 1 block 1 \(rows {block.start} .. {block.stop - 1}\) cannot be read \("
        with pytest.raises(TableFileError, match=name + ".*, for 0.3 s") as caught:
            read_block(model, 1, 1)
        assert SECRET not in str(caught.value)


def test_a_server_that_falls_silent_is_asked_again(http, monkeypatch):
    monkeypatch.setattr(sources, "READ_TIMEOUT", timedelta(seconds=3))  # in which an answer that comes has come
    over = threading.Event()

    def silent(body: bytes) -> bytes:
        over.wait(60)
        return b""

    with PackedModel.open(Url(f"{http.url}/m")) as model:
        name = f"m/{model.blocks(1)[1].file}"
        http.faults[name] = deque([silent])
        http.asked.clear()
        read_block(model, 1, 1)
        assert not over.is_set()
        over.set()
    assert len(http.gets(name)) == 2


def test_what_will_not_get_better_is_not_asked_again(http):
    with PackedModel.open(Url(f"{http.url}/m")) as model:
        block = model.blocks(1)[1]
        http.faults[f"m/{block.file}"] = deque([403] * 1000)
        http.asked.clear()
        with pytest.raises(TableFileError, match=r"block 1 .* cannot be read \(403 Forbidden, Busy\)"):
            read_block(model, 1, 1)
        assert len(http.asked) <= 2  # the block, and whether the manifest is still the same


def test_a_block_that_was_damaged_on_its_way_is_asked_for_again(http):
    with PackedModel.open(Url(f"{http.url}/m")) as model:
        name = f"m/{model.blocks(1)[0].file}"
        http.faults[name] = deque([lambda body: b"?" + body[1:]])
        read_block(model, 1, 0)
        http.faults[name] = deque([lambda body: b"?" + body[1:]] * 2)
        with pytest.raises(TableFileError, match=r"layer 1 block 0 .* has checksum .* pack the model again"):
            read_block(model, 1, 0)


@pytest.mark.parametrize("manifest_too", [True, False])
def test_another_model_in_its_place_is_noticed(http, packed, tmp_path, manifest_too):
    with PackedModel.open(packed) as model:
        other = replace(model.spec, name="other")

    def other_rows(*arguments) -> None:
        fill_rows(*arguments)
        arguments[2][:] ^= 1

    write_tables(tmp_path / "other", other, {}, other_rows, file_bytes=100_000, block_bytes=40_000)
    with PackedModel.open(Url(f"{http.url}/m")) as model:
        manifest = http.files["m/manifest.json"]
        http.add(tmp_path / "other", "m")
        if not manifest_too:
            http.files["m/manifest.json"] = manifest
        why = r"it was replaced while it was read \(412" if http.e_tags else "has checksum"
        advice = r"manifest\.json was replaced since it was read.*start again" if manifest_too else "copy it again"
        with pytest.raises(TableFileError, match=rf"layer 15 block 2 .*{why}.*{advice}"):
            read_block(model, 15, 2)
        assert len(damaged_blocks(model, lambda _: None)) == 8


def test_an_object_that_became_shorter_is_noticed(http):
    with PackedModel.open(Url(f"{http.url}/m")) as model:
        block = model.blocks(1)[1]
        http.files[f"m/{block.file}"] = http.files[f"m/{block.file}"][:-9]
        with pytest.raises(TableFileError, match=r"layer 1 block 1 .* was replaced"):
            read_block(model, 1, 1)


def test_what_to_install_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(SourceError, match=r"s3://b/m needs obstore: pip install '\.\[sources\]'"):
        PackedModel.open(Url("s3://b/m"))


def test_a_store_that_cannot_be_made_is_an_error(monkeypatch):
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(SourceError, match=r"az://c/m cannot be opened: .*[Aa]ccount"):
        open_source(Url("az://c/m"))
