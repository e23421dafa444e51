"""A client's settings as variables, and the plugin for vLLM where there is none, or where it was not asked for."""

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from engrampool_client import Client, SpecError
from engrampool_client.config import ENVIRONMENT_PREFIX, ClientConfig, Connections, from_environment
from engrampool_client.integrations import sglang as sglang_plugin
from engrampool_client.integrations import vllm as plugin
from engrampool_server.config import load_config


def environ(**variables):
    return {f"{ENVIRONMENT_PREFIX}{name.upper()}": value for name, value in {"target": "a:1", **variables}.items()}


def test_every_setting_can_be_a_variable():
    texts = {
        bool: ("true", True),
        int: ("3", 3),
        float: ("0.25", 0.25),
        tuple[int, int] | None: ("2,5", (2, 5)),
        str | Path | None: ("a file", "a file"),
        str | None: ("a-name", "a-name"),
        Connections: ("3", 3),
    }
    for setting in fields(ClientConfig):
        words = getattr(setting.type, "__args__", ())
        text, value = texts.get(setting.type) or (words[-1], words[-1])
        assert from_environment(environ(**{setting.name: text})) == {"target": ["a:1"], setting.name: value}
    assert from_environment(environ(connections="auto"))["connections"] == "auto"
    made = from_environment(environ(target="a:1  b:2", model="m", version="v", keep_memory="0", timeout_s=""))
    assert made == {"target": ["a:1", "b:2"], "model": "m", "version": "v", "keep_memory": False}


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"timeout": "3"}, "_TIMEOUT: a client has no such setting; ENGRAMPOOL_CLIENT_TIMEOUT_S was meant, perhaps"),
        ({"timeout_s": "soon"}, "_TIMEOUT_S='soon' is not allowed: could not convert"),
        ({"timeout_s": "0"}, "_TIMEOUT_S='0' is not allowed: timeout_s must be positive"),
        ({"max_steps": "1.5"}, "_MAX_STEPS='1.5' is not allowed: invalid literal"),
        ({"connections": "many"}, "_CONNECTIONS='many' is not allowed: invalid literal"),
        ({"connections": "0"}, "_CONNECTIONS='0' is not allowed: connections must be positive"),
        ({"keep_memory": "yes"}, "_KEEP_MEMORY='yes' is not allowed: it must be true or false"),
        ({"heads": "5"}, "_HEADS='5' is not allowed: heads must be two integers"),
        ({"on_failure": "masks"}, "_ON_FAILURE='masks' is not allowed: on_failure must be 'raise' or 'mask'"),
        ({"token": "a b"}, "_TOKEN=[.][.][.] is not allowed: token must be printable ASCII"),
        ({"target": ""}, "_TARGET must name the servers"),
    ],
)
def test_a_variable_that_is_wrong_is_named(variables, said):
    with pytest.raises(ValueError, match=said):
        from_environment(environ(**variables))
    with pytest.raises(ValueError, match=said):
        Client.from_environment(environ(**variables))


def test_a_client_is_made_of_variables_and_of_what_its_caller_says(server):
    variables = environ(target=server, cache_bytes="1000000", on_failure="mask", heads="0,3")
    with Client.from_environment(variables, heads=(20, 24), hashing="local") as client:
        assert client.lookup([1, 2])[1].shape == (2, 4, 264)
        assert client.cache is not None
    with pytest.raises(SpecError, match=r"no such file|cannot be read|nowhere"):
        Client.from_environment(environ(target=server, config="/nowhere/config.json"))


def test_a_server_does_not_look_at_a_clients_variables():
    resolved = load_config({"models": (Path(),)}, environ(timeout="3"), None)
    assert "environment" not in " ".join(resolved.sources.values())


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_a_plugin_does_nothing_unless_it_is_asked_for(engine):
    script = (
        f"import sys; from engrampool_client.integrations.{engine} import register; register(); print(*sys.modules)"
    )
    without = {name: value for name, value in os.environ.items() if not name.startswith(ENVIRONMENT_PREFIX)}
    done = subprocess.run([sys.executable, "-c", script], env=without, capture_output=True, text=True, check=True)
    assert not {"torch", "sglang", "vllm"} & set(done.stdout.split())


def test_vllms_plugin_refuses_variables_and_versions(monkeypatch):
    monkeypatch.setenv(f"{ENVIRONMENT_PREFIX}TARGET", "a:1")
    monkeypatch.setenv(f"{ENVIRONMENT_PREFIX}TIMEOUT_S", "soon")
    with pytest.raises(ValueError, match="_TIMEOUT_S='soon'"):
        plugin.register()
    monkeypatch.delenv(f"{ENVIRONMENT_PREFIX}TIMEOUT_S")
    monkeypatch.setattr(plugin.metadata, "version", lambda _: "0.32.1")
    with pytest.raises(RuntimeError, match=r"this is vLLM 0\.32\.1: install vllm==0\.33\.0"):
        plugin.register()


def test_sglangs_plugin_ends_the_process_over_variables_and_versions(monkeypatch):
    """The engine logs exceptions of plugins, and goes on."""
    monkeypatch.setenv(f"{ENVIRONMENT_PREFIX}TARGET", "a:1")
    monkeypatch.setenv(f"{ENVIRONMENT_PREFIX}TIMEOUT_S", "soon")
    with pytest.raises(SystemExit, match=r"engrampool: .*_TIMEOUT_S='soon'"):
        sglang_plugin.register()
    monkeypatch.delenv(f"{ENVIRONMENT_PREFIX}TIMEOUT_S")
    monkeypatch.setattr(sglang_plugin.metadata, "version", lambda _: "0.5.22")
    with pytest.raises(SystemExit, match=r"this is SGLang 0\.5\.22: install sglang==0\.5\.23"):
        sglang_plugin.register()
