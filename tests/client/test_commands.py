"""`engrampool rows` and `engrampool lookup` as a pipe sees them: files, exit codes, one line on standard error."""

import json
import stat
import sys
from contextlib import ExitStack

import click
import numpy as np
import pytest
from click.testing import CliRunner

from engrampool_client import Client
from engrampool_client.commands import lookup, rows
from engrampool_client.doctor.command import doctor
from engrampool_client.errors import BatchError, EngrampoolError, FingerprintError, RejectedError, UnavailableError
from engrampool_proto.errors import SpecError
from engrampool_proto.hashing import TokenBatch
from engrampool_proto.synthetic import synthetic_rows
from prefork import PREFORK
from server_fixtures import VOCAB, pack, serve_thread, version_of
from small_model import CONFIG, TOKENIZER


def run(command, *arguments):
    """In this process; errors are raised rather than printed, as the program's `main` would print them."""
    return CliRunner().invoke(command, [str(a) for a in arguments], standalone_mode=False, catch_exceptions=False)


def program(*arguments):
    words = [sys.executable, "-m", "engrampool_proto", *map(str, arguments)]
    return PREFORK.run(words)


@pytest.fixture
def tokens(tmp_path):
    path = tmp_path / "tokens.npy"
    np.save(path, np.random.default_rng(5).integers(0, 129280, 300).astype(np.int32))
    return path


@pytest.fixture
def out(tmp_path):
    return tmp_path / "rows.npz"


def test_rows_from_a_config_and_from_a_packed_model_are_the_specs(spec, config, packed, tokens, out, tmp_path):
    wanted = spec.hash(TokenBatch.of(np.load(tokens)))
    nested = tmp_path / "nested.json"
    nested.write_text(json.dumps({"model_type": "deepseek_v41", "text_config": CONFIG}))
    sources = (
        ("--config", config, "--tokenizer", TOKENIZER),
        ("--config", nested, "--tokenizer", TOKENIZER),
        ("--model", packed),
    )
    for source in sources:
        result = run(rows, *source, "--tokens", tokens, "--out", out, "--json")
        assert stat.S_IMODE(out.stat().st_mode) == 0o600
        with np.load(out) as found:
            assert sorted(found) == ["layer_1", "layer_14"]
            for layer, ids in wanted.items():
                array = found[f"layer_{layer}"]
                assert array.dtype == np.uint32
                assert np.array_equal(array, ids)
        summary = json.loads(result.output)
        assert summary["tokens"] == 300
        assert summary["arrays"]["layer_14"] == {"shape": [300, 24], "dtype": "uint32"}
        out.unlink()


@pytest.mark.parametrize("hashing", ["local", "server"])
def test_lookup_writes_the_rows(spec, config, server, tokens, out, hashing):
    source = ("--server", server, "--hashing", hashing, "--config", config, "--tokenizer", TOKENIZER)
    result = run(lookup, *source, "--tokens", tokens, "--out", out, "--json")
    with np.load(out) as found:
        for layer, ids in spec.hash(TokenBatch.of(np.load(tokens))).items():
            assert np.array_equal(found[f"layer_{layer}"], synthetic_rows(spec.table(layer), ids))
    summary = json.loads(result.output)
    assert summary["arrays"]["layer_1"] == {"shape": [300, 24, 264], "dtype": "uint8"}
    assert summary["server_us"]["total_us"] > 0


def test_lookup_asks_as_many_servers_as_are_named(spec, packed, tokens, out):
    with ExitStack() as stack:
        shards = [stack.enter_context(serve_thread(packed, shard=f"{shard}/2")) for shard in range(2)]
        run(lookup, *(word for address in shards for word in ("--server", address)), "--tokens", tokens, "--out", out)
    with np.load(out) as found:
        for layer, ids in spec.hash(TokenBatch.of(np.load(tokens))).items():
            assert np.array_equal(found[f"layer_{layer}"], synthetic_rows(spec.table(layer), ids))


CREDENTIALS = {
    "tls_ca": "ca.pem",
    "tls_cert": "cert.pem",
    "tls_key": "cert.key",
    "tls_name": "pool.svc",
    "token": "file:token",
}


@pytest.mark.parametrize("command", [lookup, doctor])
@pytest.mark.parametrize("by", ["flags", "variables"])
def test_each_command_that_asks_a_server_takes_every_credential(command, by, monkeypatch, tokens, out):
    made = {}

    class Made(Exception):  # noqa: N818
        """Instead of a client."""

    def make(*_, **settings):
        made.update(settings)
        raise Made

    monkeypatch.setattr("engrampool_client.client.Client", make)
    words = ["--server", "a:1", "--tokens", tokens]
    words += ["--out", out] if command is lookup else ["--layers", 20, "--decode-ms", 10]
    for name, value in CREDENTIALS.items():
        if by == "flags":
            words.append(f"--{name.replace('_', '-')}={value}")
        else:
            monkeypatch.setenv(f"ENGRAMPOOL_CLIENT_{name.upper()}", value)
    with pytest.raises(Made):
        run(command, *words)
    assert {name: str(made[name]) for name in CREDENTIALS} == CREDENTIALS


@pytest.mark.parametrize("hashing", ["local", "server"])
@pytest.mark.parametrize("limits", [{"max_rows_per_request": 48 * 7}, {"max_answer_bytes": 48 * 264 * 11}])
def test_a_sequence_longer_than_the_server_takes_at_once_is_asked_for_in_pieces(
    spec, packed, tokens, out, hashing, limits
):
    with serve_thread(packed, **limits) as address:
        with pytest.raises(RejectedError), Client(address, hashing=hashing, dedupe=False) as client:
            client.lookup(np.load(tokens))
        result = run(lookup, "--server", address, "--hashing", hashing, "--tokens", tokens, "--out", out, "--json")
    with np.load(out) as found:
        for layer, ids in spec.hash(TokenBatch.of(np.load(tokens))).items():
            assert np.array_equal(found[f"layer_{layer}"], synthetic_rows(spec.table(layer), ids))
    assert json.loads(result.output)["tokens"] == 300


def test_an_empty_sequence_has_no_rows(server, out, tmp_path):
    np.save(tmp_path / "none.npy", np.empty(0, np.int32))
    run(lookup, "--server", server, "--tokens", tmp_path / "none.npy", "--out", out)
    with np.load(out) as found:
        assert found["layer_14"].shape == (0, 24, 264)


def test_what_goes_wrong_is_raised_typed_and_leaves_no_file(config, packed, server, tokens, out, tmp_path):
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**CONFIG, "engram_head_dim": 128}))
    nothing = tmp_path / "nothing.json"
    nothing.write_text("{}")
    bad_tokens = tmp_path / "bad.npy"
    deep = tmp_path / "deep"
    deep.mkdir()
    (deep / "manifest.json").write_text("[" * 100_000)
    hash_it = ("--model", packed)
    cases = (
        (BatchError, "is no .npy file", rows, (*hash_it, "--tokens", other)),
        (SpecError, "describes no model", rows, ("--config", nothing, "--tokens", tokens)),
        (SpecError, r"tokenizer\.json is needed", rows, ("--config", config, "--tokens", tokens)),
        (
            SpecError,
            "cannot be read as a tokenizer",
            rows,
            ("--config", config, "--tokenizer", other, "--tokens", tokens),
        ),
        (EngrampoolError, r"manifest\.json cannot be read", rows, ("--model", tmp_path, "--tokens", tokens)),
        (EngrampoolError, r"manifest\.json cannot be read", rows, ("--model", deep, "--tokens", tokens)),
        (FingerprintError, "row_format", lookup, ("--server", server, "--config", other, "--tokenizer", TOKENIZER)),
        (UnavailableError, "no server", lookup, ("--server", "127.0.0.1:1", "--timeout-s", 0.3)),
    )
    for kind, text, command, arguments in cases:
        given = arguments if "--tokens" in arguments else (*arguments, "--tokens", tokens)
        with pytest.raises(kind, match=text):
            run(command, *given, "--out", out)
    for array, text in (
        (np.zeros(3), r"cannot be made int32: they are float64"),
        (np.array([7, 2**32 + 7]), r"bad.npy\[1\] is 4294967303"),
        (np.zeros((2, 2), np.int32), r"it holds int32 \[2, 2\]"),
        (np.array([129280], np.int32), r"tokens\[0\] is 129280"),
    ):
        np.save(bad_tokens, array)
        with pytest.raises(BatchError, match=text):
            run(rows, *hash_it, "--tokens", bad_tokens, "--out", out)
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))


def test_exit_codes_of_the_real_program(packed, tokens, out, tmp_path):
    done = program("rows", "--model", packed, "--tokens", tokens, "--out", out)
    assert (done.returncode, done.stderr) == (0, "")
    assert "layer_1 uint32 [300, 24]" in done.stdout

    usage = program("rows", "--tokens", tokens, "--out", out)
    assert usage.returncode == 2
    assert "give either --model, or --config with --tokenizer" in usage.stderr

    with pytest.raises(click.UsageError, match=r"'http://127.0.0.1:1' is not HOST:PORT, .* etcd://"):
        run(lookup, "--server", "http://127.0.0.1:1", "--tokens", tokens, "--out", out)

    absent = program("rows", "--model", packed, "--tokens", tmp_path / "absent.npy", "--out", out)
    assert (absent.returncode, absent.stdout) == (1, "")
    assert absent.stderr == f"engrampool: {tmp_path / 'absent.npy'} cannot be read: No such file or directory\n"

    failed = program("lookup", "--server", "127.0.0.1:1", "--timeout-s", "0.3", "--tokens", tokens, "--out", out)
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert len(failed.stderr.splitlines()) == 1
    assert failed.stderr.startswith("engrampool: no server at 127.0.0.1:1 was ready within 0.3 s")

    unwritable = program("rows", "--model", packed, "--tokens", tokens, "--out", tmp_path / "absent" / "rows.npz")
    assert unwritable.returncode == 1
    assert len(unwritable.stderr.splitlines()) == 1
    assert "No such file" in unwritable.stderr


def test_no_file_mixes_two_versions(tmp_path, out, monkeypatch):
    """Another version is made active between two pieces: all are asked for again, of that one."""
    models = pack(tmp_path / "first"), pack(tmp_path / "second", change=True)
    first, second = map(version_of, models)
    ids = np.random.default_rng(5).integers(0, VOCAB, 300).astype(np.int32)
    np.save(tmp_path / "tokens.npy", ids)
    begun = []

    class Follower(Client):
        """From the second piece on the active version is another one."""

        def __init__(self, target, name, version, **settings):
            super().__init__(target, name, version, **settings)
            self.next = Client(target, name, second, **settings)

        version = property(lambda self: second if len(begun) >= 2 else first)
        version_changes = property(lambda self: {"followed": len(begun) >= 2})

        def prefetch(self, *arguments, **how):
            now = super() if self.version == first else self.next
            begun.append(self.version)
            return now.prefetch(*arguments, **how)

        def close(self):
            self.next.close()
            super().close()

    monkeypatch.setattr("engrampool_client.client.Client", Follower)
    with serve_thread(*models, max_rows_per_request=400) as address:
        run(lookup, "--server", address, "--version", first, "--tokens", tmp_path / "tokens.npy", "--out", out)
        with Client(address, version=second) as client, np.load(out) as found:
            for layer, rows_of_second in client.lookup(ids[:40]).items():
                assert np.array_equal(found[f"layer_{layer}"][:40], rows_of_second)
    assert begun[:3] == [first, first, second]
