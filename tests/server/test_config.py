import json
import os
from dataclasses import fields
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engrampool_proto.errors import EngrampoolError
from engrampool_server.commands.serve import serve_options
from engrampool_server.config import ConfigError, ServerConfig, load_config, render

GIB = 1 << 30
NAMES = [setting.name for setting in fields(ServerConfig)]

addresses = st.builds(
    "{}:{}".format,
    st.sampled_from(["127.0.0.1", "0.0.0.0", "localhost", "node-1.pool.svc", "[::1]", "[::]"]),
    st.integers(0, 65535),
)
# Colons separate directories in the environment; surrogates and NUL are in no name that TOML can hold.
directory_names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0:/"), min_size=1, max_size=12)
VALUES = {
    "models": st.lists(directory_names.map(lambda name: f"/{name}"), min_size=1, max_size=3, unique_by=Path),
    "listen": addresses | directory_names.map(lambda name: f"unix:/{name}"),
    "metrics": addresses | st.just("off"),
    "direct": addresses | st.sampled_from(["auto", "off"]) | directory_names.map(lambda name: f"unix:/{name}"),
    # A registry has demands on other settings, named shards want a placement, and a certificate its key: see below.
    "direct_spin_s": st.floats(0, 0.1),
    "slow_lookup_s": st.floats(0, 3600),
    "tls_cert": st.just("off"),
    "tls_key": st.just("off"),
    "tls_client_ca": st.just("off"),
    "tls_metrics": st.booleans(),
    "tokens": directory_names.map(lambda name: f"/{name}") | st.just("off"),
    "lane_tls": st.sampled_from(["none", "off", "on"]),
    "registry": st.just("off"),
    "join": st.just(False),
    "advertise": addresses.filter(lambda text: not text.endswith(":0")) | st.just("auto"),
    "registry_cache": directory_names.map(lambda name: f"/{name}") | st.just("off"),
    "shard": st.sampled_from(["all", "0/1", "3/4", "65535/65536"]),
    "shard_by": st.sampled_from(["head", "row", "layer"]),
    "placement": st.just("off"),
    "workers": st.integers(1, 1024),
    "worker_timeout_s": st.floats(0.5, 3600),
    "memory": st.sampled_from(["anon", "shm", "hugetlb", "file:/a b", 'file:rel/"x']),
    "attach": st.sampled_from(["off", "user", "group", "all"]),
    "emulate": st.sampled_from(["off", "cxl-direct", "/a b.json", "./x"]),
    "numa": st.sampled_from(["off", "interleave", "local", "bind:0", "bind:12"]),
    "lock_memory": st.booleans(),
    "pin_malloc": st.booleans(),
    "load_threads": st.integers(1, 64),
    "gather_threads": st.integers(0, 64),
    "max_rows_per_request": st.integers(1, 1 << 31),
    # Apart from each other and on either side of both defaults, so that no choice of sources contradicts itself.
    "max_answer_bytes": st.integers(1024, GIB),
    "max_in_flight_bytes": st.integers(GIB, 1 << 40),
    "stream_chunk_bytes": st.integers(64 << 10, 4 << 20),
    "drain_s": st.floats(0, 3600),
    "log_level": st.sampled_from(["debug", "info", "warning", "error"]),
    "event_loop": st.sampled_from(["uvloop", "asyncio"]),
}
some_settings = st.fixed_dictionaries({}, optional=VALUES)
# name: values that no source may give. Integers and floats stand for TOML's, text for any source's.
BAD = {
    "models": [[""], ["/a", ""], ["/a", "/a"], [1], "/a", ["/a\0b"], ["/\udcff"]],
    "listen": [
        "",
        "host",
        ":1",
        "host:",
        "host:65536",
        "::1:1",
        "[::1]",
        "[host]:1",
        "10.0.0.256:1",
        "a b:1",
        "unix:",
        "unix:a\0b",
        "off",
        1,
    ],
    "metrics": ["", "on", "localhost", "host:-1", "[::1:9464", False],
    "direct": ["", "on", "localhost", "host:-1", "unix:", "unix:a\0b", "unix:\udcff", False],
    "direct_spin_s": ["", "-1", "0.11", "nan", "50us", True],
    "slow_lookup_s": ["", "-1", "3600.1", "nan", "1s", True],
    "tls_cert": ["", "a\0b", "\udcff", 1, True],
    "tls_key": ["", "a\0b", "\udcff", 1, True],
    "tls_client_ca": ["", "a\0b", "\udcff", 1, True],
    "tls_metrics": ["", "yes", "2", 1, 0],
    "tokens": ["", "a\0b", "\udcff", 1, True],
    "lane_tls": ["", "auto", "OFF", 1, True],
    "registry": ["", "on", "etcd://", "etcd://host", "etcd://host:0", "http://host:2379", "etcd://h:1/a b", False],
    "join": ["", "yes", "2", 1, 0],
    "advertise": ["", "off", "host", "host:0", "[::1]:65536", 1],
    "registry_cache": ["", "a\0b", "\udcff", 1, True],
    "shard": ["", "4/4", "-1/4", "01/4", "1/", "0/0", "0/65537", "1 / 4", "a/b", "a b", "-a", "a" * 65, 1, True],
    "shard_by": ["", "heads", "Row", "rendezvous", 1],
    "placement": ["", "a\0b", "\udcff", 1, True],
    "workers": ["", "0", "1025", "1.5", 0, True],
    "worker_timeout_s": ["", "0.4", "3600.1", "nan", "10s", True],
    "memory": ["", "dram", "ANON", 1],
    "attach": ["", "on", "User", 0o644, True],
    "emulate": ["", "on", "cxl", "a\0/b", "/\udcff", 1, True],
    "numa": ["", "on", "bind", "bind:", "bind:-1", "bind:01", "bind:1000", "bind:0,1", 0, True],
    "lock_memory": ["", "yes", "2", 1, 0],
    "pin_malloc": ["", "yes", "2", 1, 0],
    "load_threads": ["", "0", "65", "1.5", "four", -1, 1.0, True, [4]],
    "gather_threads": ["", "-1", "65", -1, False],
    "max_rows_per_request": ["", "0", str((1 << 31) + 1), 0, "1MiB"],
    "max_answer_bytes": ["", "1023", "2TiB", "1GB", "1.5GiB", "-1", "GiB", "1 gib", 1e9, True],
    "max_in_flight_bytes": ["", "1023", "1025GiB", 0],
    "stream_chunk_bytes": ["", "65535", "63KiB", "4097KiB", 1],
    "drain_s": ["", "-1", "3600.1", "nan", "inf", "10s", True],
    "log_level": ["", "trace", "INFO", 20],
    "event_loop": ["", "trio", None, 0],
}


def toml_of(values):
    """JSON's literals are TOML's for what is in `values`, but for DEL and for escapes beyond the BMP."""
    return "".join(
        f"{name} = {json.dumps(value, ensure_ascii=False)}\n".replace("\x7f", "\\u007f")
        for name, value in values.items()
    )


def environ_of(values):
    return {
        f"ENGRAMPOOL_{name.upper()}": os.pathsep.join(value) if name == "models" else str(value)
        for name, value in values.items()
    }


def flag_of(name, value):
    flag = "--model" if name == "models" else f"--{name.replace('_', '-')}"
    return f"--no-{flag[2:]}" if value is False else flag


def parsed(name, value):
    return tuple(map(Path, value)) if name == "models" else value


@pytest.fixture
def file(tmp_path):
    return tmp_path / "server.toml"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(in_file=some_settings, in_environment=some_settings, in_flags=some_settings)
def test_any_subset_of_sources_resolves_by_priority_and_round_trips(file, in_file, in_environment, in_flags):
    in_flags = {"models": ["/m"]} | in_flags
    given_by = {"file": in_file, "environment": in_environment, "flag": in_flags}
    file.write_text(toml_of(given_by["file"]), encoding="utf-8", newline="")

    resolved = load_config(given_by["flag"], environ_of(given_by["environment"]), file)

    labels = {
        "file": lambda name, value: f"file {file}",
        "environment": lambda name, value: f"environment ENGRAMPOOL_{name.upper()}",
        "flag": lambda name, value: f"flag {flag_of(name, value)}",
    }
    defaults = ServerConfig(models=(Path("/m"),))
    for name in NAMES:
        winner = next((source for source in reversed(given_by) if name in given_by[source]), None)
        if winner is None:
            assert resolved.sources[name] == "default"
            assert getattr(resolved.config, name) == getattr(defaults, name)
        else:
            value = given_by[winner][name]
            assert resolved.sources[name] == labels[winner](name, value)
            assert getattr(resolved.config, name) == parsed(name, value)

    file.write_text(render(resolved), encoding="utf-8", newline="")
    again = load_config({}, {}, file)
    assert again.config == resolved.config
    assert set(again.sources.values()) == {f"file {file}"}


def test_defaults():
    config = load_config({"models": ("/m",)}, {}, None).config
    assert config == ServerConfig(
        models=(Path("/m"),),
        listen="127.0.0.1:50051",
        metrics="127.0.0.1:9464",
        memory="anon",
        lock_memory=False,
        pin_malloc=True,
        load_threads=min(4, len(os.sched_getaffinity(0))),
        gather_threads=0,
        max_rows_per_request=4_194_304,
        max_answer_bytes=GIB // 2,
        max_in_flight_bytes=GIB,
        stream_chunk_bytes=1 << 20,
        drain_s=10.0,
        log_level="info",
        event_loop="uvloop",
    )


def test_every_field_states_its_unit_range_and_help():
    for setting in fields(ServerConfig):
        assert setting.metadata["allowed"], setting.name
        assert setting.metadata["help"].endswith("."), setting.name
    units = {setting.name: setting.metadata["unit"] for setting in fields(ServerConfig) if setting.metadata["unit"]}
    assert units == {
        "direct_spin_s": "seconds",
        "slow_lookup_s": "seconds",
        "workers": "processes",
        "worker_timeout_s": "seconds",
        "load_threads": "threads",
        "gather_threads": "threads",
        "max_rows_per_request": "rows",
        "max_answer_bytes": "bytes",
        "max_in_flight_bytes": "bytes",
        "stream_chunk_bytes": "bytes",
        "drain_s": "seconds",
    }


def test_bad_values_are_listed_for_every_field():
    assert list(BAD) == NAMES == list(VALUES)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_a_wrong_value_names_itself_and_the_range(name, value, file):
    with pytest.raises(ConfigError) as caught:
        ServerConfig(**{"models": (Path("/m"),), name: value})
    allowed = next(setting.metadata["allowed"] for setting in fields(ServerConfig) if setting.name == name)
    assert str(caught.value) == f"{name}: {value!r} is not allowed; allowed: {allowed}"
    assert isinstance(caught.value, EngrampoolError)
    if isinstance(value, str):
        with pytest.raises(ConfigError) as caught:
            load_config({"models": ["/m"], name: value}, {}, None)
        assert f"{name}: {value!r} from flag {flag_of(name, value)}" in str(caught.value)
    if isinstance(value, str) and value and name != "models":  # an empty variable is as if it were not set
        with pytest.raises(ConfigError) as caught:
            load_config({"models": ["/m"]}, {f"ENGRAMPOOL_{name.upper()}": value}, None)
        assert f"{name}: {value!r} from environment ENGRAMPOOL_{name.upper()}" in str(caught.value)
    if value is not None and "\\ud" not in json.dumps(value):
        file.write_text(toml_of({name: value}))
        with pytest.raises(ConfigError) as caught:
            load_config({} if name == "models" else {"models": ["/m"]}, {}, file)
        assert f"{name}: {value!r} from file {file}" in str(caught.value)


def test_a_wrong_value_is_refused_even_where_a_flag_overrides_it():
    with pytest.raises(ConfigError, match="ENGRAMPOOL_LOAD_THREADS"):
        load_config({"models": ["/m"], "load_threads": "2"}, {"ENGRAMPOOL_LOAD_THREADS": "0"}, None)


def test_answers_in_flight_must_hold_the_largest_answer():
    with pytest.raises(ConfigError, match=r"max_in_flight_bytes: 1GiB is below max_answer_bytes, 3GiB"):
        load_config({"models": ["/m"]}, {"ENGRAMPOOL_MAX_ANSWER_BYTES": "3GiB"}, None)
    equal = {"models": ["/m"], "max_answer_bytes": "3GiB", "max_in_flight_bytes": "3GiB"}
    assert load_config(equal, {}, None).config.max_in_flight_bytes == 3 * GIB


@pytest.mark.parametrize("flags", [{}, {"models": None}, {"models": ()}, {"models": []}])
def test_no_models(flags):
    with pytest.raises(ConfigError, match=r"models: none given; use --model DIR, ENGRAMPOOL_MODELS"):
        load_config(flags, {}, None)


def test_an_empty_entry_of_engrampool_models_is_not_the_working_directory():
    with pytest.raises(ConfigError, match=r"\['/a', ''\] from environment ENGRAMPOOL_MODELS"):
        load_config({}, {"ENGRAMPOOL_MODELS": f"/a{os.pathsep}"}, None)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("listn", "did you mean listen?"), ("max_rows", "did you mean max_rows_per_request?"), ("x", "known: models, ")],
)
def test_unknown_keys_of_a_file(name, hint, file):
    file.write_text(f"{name} = 1\n")
    with pytest.raises(ConfigError) as caught:
        load_config({"models": ["/m"]}, {}, file)
    assert f"unknown setting {name!r} in {file}; {hint}" in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "hint"),
    [
        ("ENGRAMPOOL_LISTN", "did you mean ENGRAMPOOL_LISTEN?"),
        ("ENGRAMPOOL_LISTEN_PORT", "did you mean ENGRAMPOOL_LISTEN?"),
        ("ENGRAMPOOL_MODEL", "did you mean ENGRAMPOOL_MODELS?"),
        ("ENGRAMPOOL_listen", "did you mean ENGRAMPOOL_LISTEN?"),
        ("ENGRAMPOOL_TOKEN", "did you mean ENGRAMPOOL_TOKENS?"),
        ("ENGRAMPOOL_X", "known: ENGRAMPOOL_MODELS, "),
    ],
)
def test_unknown_variables(variable, hint):
    with pytest.raises(ConfigError) as caught:
        load_config({"models": ["/m"]}, {variable: "50051"}, None)
    assert f"unknown environment variable {variable}; {hint}" in str(caught.value)
    assert "50051" not in str(caught.value)  # it may be a token


def test_empty_variables_are_as_if_they_were_not_set(file):
    file.write_text("drain_s = 3.0")
    names = [setting.name for setting in fields(ServerConfig)]
    empty = {f"ENGRAMPOOL_{name.upper()}": "" for name in names} | {"ENGRAMPOOL_ANYTHING": ""}
    resolved = load_config({"models": ["/m"]}, empty, file)
    assert resolved == load_config({"models": ["/m"]}, {}, file)
    assert resolved.config.drain_s == 3.0
    with pytest.raises(ConfigError, match="models: none given"):
        load_config({}, empty, None)


def test_unknown_flags_are_called_as_flags():
    with pytest.raises(ConfigError, match=r"unknown flag 'model'; did you mean --model\?"):
        load_config({"model": ["/m"]}, {}, None)


def test_service_links_of_kubernetes_are_not_settings():
    links = {
        "ENGRAMPOOL_SERVICE_HOST": "10.96.7.1",
        "ENGRAMPOOL_SERVICE_PORT": "50051",
        "ENGRAMPOOL_SERVICE_PORT_GRPC": "50051",
        "ENGRAMPOOL_PORT": "tcp://10.96.7.1:50051",
        "ENGRAMPOOL_PORT_50051_TCP": "tcp://10.96.7.1:50051",
        "ENGRAMPOOL_PORT_50051_TCP_PROTO": "tcp",
        "ENGRAMPOOL_PORT_50051_TCP_PORT": "50051",
        "ENGRAMPOOL_PORT_50051_TCP_ADDR": "10.96.7.1",
        "ENGRAMPOOL_METRICS_SERVICE_HOST": "10.96.7.2",
        "ENGRAMPOOL_METRICS_PORT": "tcp://10.96.7.2:9464",
        "ENGRAMPOOL_METRICS_PORT_9464_TCP_ADDR": "10.96.7.2",
        "KUBERNETES_PORT": "tcp://10.96.0.1:443",
    }
    resolved = load_config({"models": ["/m"]}, links, None)
    assert resolved == load_config({"models": ["/m"]}, {}, None)
    with pytest.raises(ConfigError, match="unknown environment variable ENGRAMPOOL_PORT;"):
        load_config({"models": ["/m"]}, {"ENGRAMPOOL_PORT": "50051"}, None)


@pytest.mark.parametrize("content", [b"listen 1", b"\xff = 1"])
def test_a_file_that_is_not_toml(content, file):
    file.write_bytes(content)
    with pytest.raises(ConfigError, match="is not a TOML file"):
        load_config({"models": ["/m"]}, {}, file)


def test_a_file_that_is_not_there(file):
    with pytest.raises(ConfigError, match=r"cannot read .*: No such file or directory"):
        load_config({"models": ["/m"]}, {}, file)


def test_render_states_source_and_range(file):
    file.write_text("load_threads = 3\n")
    flags = {"models": ["/m"], "lock_memory": False}
    lines = render(load_config(flags, {"ENGRAMPOOL_DRAIN_S": "2"}, file)).splitlines()
    assert len(lines) == len(NAMES)
    assert f"load_threads = 3  # from file {file}; allowed: 1..64 threads" in lines
    assert "drain_s = 2.0  # from environment ENGRAMPOOL_DRAIN_S; allowed: 0..3600 seconds" in lines
    assert "lock_memory = false  # from flag --no-lock-memory; allowed: true, false" in lines
    assert any(line.startswith('models = ["/m"]  # from flag --model; allowed: different') for line in lines)
    assert 'memory = "anon"  # from default; allowed: anon, shm, hugetlb, file:DIR' in lines


def test_a_named_shard_and_a_placement_go_together():
    models = (Path("/m"),)
    config = ServerConfig(models=models, shard="west", placement="/p.json")
    assert (config.shard, config.placement) == ("west", "/p.json")
    with pytest.raises(ConfigError, match="'west' is the name of a part in a placement; give --placement FILE"):
        ServerConfig(models=models, shard="west")
    for shard in ("all", "1/4"):
        with pytest.raises(ConfigError, match=f"'{shard}' is no name of a shard in /p.json"):
            ServerConfig(models=models, shard=shard, placement="/p.json")


def test_with_a_registry_models_need_not_be_given(file):
    given = {"registry": "etcd://10.0.0.5:2379/pool", "memory": "shm"}
    resolved = load_config(given, {}, None)
    assert resolved.config.models == ()
    file.write_text(render(resolved))
    assert load_config({}, {}, file).config == resolved.config
    assert load_config({**given, "models": ["/m"]}, {}, None).config.models == (Path("/m"),)


def test_a_registry_of_the_environment_is_joined_only_where_that_is_asked_for(file):
    """It stands in an operator's shell, for `engrampool publish` and the like."""
    shell = {"ENGRAMPOOL_REGISTRY": "etcd://10.0.0.5:2379/pool"}
    alone = load_config({"models": ["/m"]}, shell, None)
    assert alone.config.registry == "off"
    line = next(line for line in render(alone).splitlines() if line.startswith("registry ="))
    assert 'registry = "off"  # from default, since environment ENGRAMPOOL_REGISTRY counts only with --join' in line
    with pytest.raises(ConfigError, match=r"none given; use --model DIR, or --join .* in ENGRAMPOOL_REGISTRY"):
        load_config({}, shell, None)
    for joining, environ in (({"join": True}, shell), ({}, {**shell, "ENGRAMPOOL_JOIN": "true"})):
        resolved = load_config({"memory": "shm", **joining}, environ, None)
        assert resolved.config.registry == shell["ENGRAMPOOL_REGISTRY"]
    # A registry that is named for this server is joined.
    file.write_text('registry = "etcd://file:1"\nmemory = "shm"\n')
    assert load_config({}, shell, file).config.registry == "etcd://file:1"
    named = load_config({"memory": "shm", "registry": "etcd://h:1"}, shell, None)
    assert named.config.registry == "etcd://h:1"
    with pytest.raises(ConfigError, match="join: no registry is named"):
        load_config({"models": ["/m"], "join": True}, {}, None)


def test_a_registry_needs_memory_that_processes_share_and_an_address_to_give_away():
    settings = {"registry": "etcd://localhost:2379", "memory": "shm", "listen": "0.0.0.0:50051"}
    assert ServerConfig(**settings, advertise="node-1:50051").advertise == "node-1:50051"
    with pytest.raises(ConfigError, match=r"memory: 'anon' is private, .* set shm, hugetlb or file:DIR"):
        ServerConfig(**{**settings, "memory": "anon"})
    with pytest.raises(ConfigError, match=r"listen: .* at 0\.0\.0\.0:50051; set --advertise HOST:PORT"):
        ServerConfig(**settings)
    with pytest.raises(ConfigError, match=r"advertise: .* at \[::\]:1; set --advertise HOST:PORT"):
        ServerConfig(**settings, advertise="[0::0]:1")


def test_a_pods_index_makes_a_shard():
    assert load_config({"models": ["/m"]}, {"ENGRAMPOOL_SHARD": "2/4"}, None).config.shard == "2/4"


def test_render_survives_a_file_name_with_a_line_break(tmp_path):
    file = tmp_path / "server\n.toml"
    file.write_text('models = ["/m"]\n')
    text = render(load_config({}, {}, file))
    again = tmp_path / "again.toml"
    again.write_text(text)
    assert load_config({}, {}, again).config.models == (Path("/m"),)


def invoke(*arguments):
    seen = {}

    @click.command()
    @serve_options
    def serve(**flags):
        seen.update(flags)

    result = CliRunner().invoke(serve, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return seen, result.output


def test_options_not_given_leave_every_setting_to_other_sources():
    flags, _ = invoke()
    assert set(flags) == set(NAMES)
    resolved = load_config(flags, {"ENGRAMPOOL_MODELS": f"/a{os.pathsep}/b"}, None)
    assert set(resolved.sources.values()) == {"default", "environment ENGRAMPOOL_MODELS"}
    assert resolved.config.models == (Path("/a"), Path("/b"))


@settings(max_examples=30, deadline=None)
@given(st.fixed_dictionaries(VALUES))
def test_options_take_every_setting(values):
    arguments = []
    for name, value in values.items():
        if isinstance(value, bool):
            arguments.append(flag_of(name, value))
            continue
        for one in value if isinstance(value, list) else [value]:
            arguments.append(f"{flag_of(name, value)}={one}")
    flags, _ = invoke(*arguments)
    resolved = load_config(flags, {}, None)
    assert resolved.config == ServerConfig(**values)
    assert resolved.sources == {name: f"flag {flag_of(name, value)}" for name, value in values.items()}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tls_cert": "c"}, "tls_cert: goes with tls_key"),
        ({"tls_key": "k"}, "tls_key: goes with tls_cert"),
        ({"tls_client_ca": "ca"}, "tls_client_ca: clients show certificates over TLS only"),
        ({"tls_cert": "c", "tls_key": "k", "lane_tls": "none", "direct": "a:1"}, "direct: a:1 has no lane beside TLS"),
    ],
)
def test_settings_of_tls_that_contradict_each_other(given, said):
    with pytest.raises(ConfigError, match=said):
        load_config({"models": (Path("/m"),), **given}, {}, None)


@pytest.mark.parametrize(
    ("given", "lane"),
    [
        ({}, "auto"),
        ({"tls_cert": "c", "tls_key": "k"}, "auto"),
        ({"tls_cert": "c", "tls_key": "k", "lane_tls": "none"}, "off"),
        ({"tls_cert": "c", "tls_key": "k", "lane_tls": "off"}, "auto"),
        ({"tls_cert": "c", "tls_key": "k", "lane_tls": "off", "direct": "a:1"}, "a:1"),
        ({"tls_cert": "c", "tls_key": "k", "lane_tls": "none", "direct": "unix:/a"}, "unix:/a"),
        ({"tls_cert": "c", "tls_key": "k", "lane_tls": "none", "listen": "unix:/a"}, "auto"),
    ],
)
def test_beside_tls_there_is_a_lane_over_tcp_unless_there_is_to_be_none(given, lane):
    assert load_config({"models": (Path("/m"),), **given}, {}, None).config.lane == lane


def test_help_states_ranges_and_defaults():
    _, output = invoke("--help")
    text = " ".join(output.split())
    for part in ("--model DIR", "--lock-memory / --no-lock-memory", "64KiB..4MiB", 'default: "127.0.0.1:50051"'):
        assert part in text
