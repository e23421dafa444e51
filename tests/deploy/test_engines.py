"""The examples of an engine beside the pool: do they fit the plugins, the settings, the pool's files, and schemas?"""

import json
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from engrampool_client.config import from_environment

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PLUGINS = ROOT / "client/engrampool_client/integrations"
ENGINES = ["vllm", "sglang"]
VERSIONS = ("1.31", kubernetes_validate.latest_version())


def compose(engine: str) -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "engines" / f"{engine}.yaml").read_text())["services"][engine]


def pod(engine: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The deployment, and its container."""
    made = yaml.safe_load((DEPLOY / "kubernetes/engines" / f"{engine}.yaml").read_text())
    (container,) = made["spec"]["template"]["spec"]["containers"]
    return made, container


def options(arguments: list[str]) -> dict[str, str]:
    return dict(one.split("=", 1) for one in arguments if one.startswith("--"))


@pytest.mark.parametrize("engine", ENGINES)
def test_they_start_the_version_that_the_plugin_is_for(engine):
    source = (PLUGINS / f"{engine}.py").read_text()
    version = re.search(r'^VERSION = "([\d.]+)"', source, re.MULTILINE)[1]
    assert compose(engine)["build"]["args"]["ENGINE"].endswith(f":v{version}")
    assert f":v{version}" in (DEPLOY / "engines/Dockerfile").read_text()


@pytest.mark.parametrize("engine", ENGINES)
def test_their_settings_are_those_of_a_client(engine):
    _, container = pod(engine)
    environments = [compose(engine)["environment"], {one["name"]: one["value"] for one in container["env"]}]
    for environment in environments:
        settings = from_environment(environment)
        assert settings["on_failure"] == "mask"
        assert settings["timeout_s"] == 1.0
    base = yaml.safe_load((DEPLOY / "kubernetes/base/shared/service.yaml").read_text())
    (port,) = [one["port"] for one in base["spec"]["ports"] if one["name"] == "grpc"]
    assert environments[1]["ENGRAMPOOL_CLIENT_TARGET"] == f"dns:///{base['metadata']['name']}:{port}"
    ports = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["engrampool"]["ports"]
    target = re.fullmatch(r"\$\{POOL:-engrampool:(\d+)\}", environments[0]["ENGRAMPOOL_CLIENT_TARGET"])[1]
    assert any(one.endswith(f":{target}") for one in ports)


@pytest.mark.parametrize("engine", ENGINES)
def test_both_examples_start_it_as_the_page_does(engine):
    _, container = pod(engine)
    command = compose(engine)["command"]
    assert command == container["args"]
    assert compose(engine)["entrypoint"] == container["command"]
    page = (ROOT / "docs" / f"INTEGRATION_{engine.upper()}.md").read_text(encoding="utf-8")
    start = {"vllm": "vllm serve ", "sglang": "python -m sglang.launch_server "}[engine]
    words = shlex.split(page[page.index(start) + len(start) :].split("\n```")[0].replace("\\\n", " "))
    asked = {name: value for name, value in pairwise(words) if name.startswith("--")}
    ours = options(command)
    for name, value in asked.items():
        if name != "--model-path":
            assert ours[name] == value, name


@pytest.mark.parametrize("engine", ENGINES)
def test_the_pool_lets_them_in_and_their_objects_follow_the_schema(engine):
    made, _ = pod(engine)
    policy = yaml.safe_load((DEPLOY / "kubernetes/base/shared/network-policy.yaml").read_text())
    (selector,) = policy["spec"]["ingress"][0]["from"][0]["podSelector"]["matchExpressions"]
    assert made["spec"]["template"]["metadata"]["labels"][selector["key"]] in selector["values"]
    for version in VERSIONS:
        kubernetes_validate.validate(json.loads(json.dumps(made)), version, strict=True)


def test_what_the_image_copies_is_let_through():
    text = (DEPLOY / "engines/Dockerfile").read_text()
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for sources in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        assert set(sources.split()) <= allowed
        assert all((ROOT / source).exists() for source in sources.split())
    for engine in ENGINES:
        build = compose(engine)["build"]
        # Of the first file's folder, as Compose reads several.
        assert (DEPLOY / build["context"] / build["dockerfile"]).samefile(DEPLOY / "engines/Dockerfile")


def test_hadolint_has_nothing_to_say():
    hadolint = Path(sys.executable).parent / "hadolint"
    command = [hadolint, DEPLOY / "engines/Dockerfile"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
