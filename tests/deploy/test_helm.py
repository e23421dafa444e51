"""The chart, rendered by Helm's own library: it gives what kustomize's base gives, and refuses wrong values."""

import json
import shutil
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import kubernetes_validate
import pytest
import yaml

from engrampool_proto import __version__
from server_fixtures import lacking

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy/helm"


@pytest.fixture(scope="module")
def helm() -> ModuleType:
    if find_spec("helm_python") is None:  # its wheel is for x86-64 alone
        lacking("Helm's library is not installed: pip install -e '.[dev]'")
    return import_module("helm_python")


def render(helm: ModuleType, values: dict[str, Any], name: str = "engrampool") -> dict[str, Any]:
    """What `helm template` gives, by kind; each there once."""
    with helm.Chart.load(str(CHART)) as chart:
        rendered = chart.render(values, name=name, namespace="engram")
    built = [yaml.safe_load(text) for text in rendered.values()]
    assert len({one["kind"] for one in built}) == len(built)
    return {one["kind"]: one for one in built}


def built_by_kustomize(directory: Path) -> dict[str, Any]:
    command = [Path(sys.executable).parent / "kubectl", "kustomize", directory]
    built = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    return {one["kind"]: one for one in yaml.safe_load_all(built)}


def in_order(one: Any) -> Any:
    """The same with lists of named things in the order of their names: a patch of kustomize's puts its own first."""
    if isinstance(one, dict):
        return {key: in_order(value) for key, value in one.items()}
    if isinstance(one, list) and all(isinstance(item, dict) and "name" in item for item in one):
        return sorted(map(in_order, one), key=lambda item: item["name"])
    return [in_order(item) for item in one] if isinstance(one, list) else one


def test_by_default_it_is_the_base_of_kustomize(helm):
    assert render(helm, {}) == built_by_kustomize(ROOT / "deploy/kubernetes/base")


SECRETS = {"tlsSecret": "engrampool-tls", "callersSecret": "engrampool-callers"}


@pytest.mark.parametrize(
    ("values", "components"),
    [
        (SECRETS, ["tls"]),
        ({"shm": "50Gi"}, ["shm"]),
        ({"memory": "4Gi", "hugepages": "48Gi"}, ["hugepages"]),
        ({**SECRETS, "memory": "4Gi", "hugepages": "48Gi"}, ["tls", "hugepages"]),
    ],
    ids=str,
)
def test_each_part_is_the_component_of_kustomize(helm, values, components, tmp_path):
    # It takes paths relative to the overlay alone.
    shutil.copytree(ROOT / "deploy/kubernetes", tmp_path / "kubernetes")
    overlay = tmp_path / "kubernetes/overlays/of-test"
    overlay.mkdir()
    named = [f"../../components/{name}" for name in components]
    (overlay / "kustomization.yaml").write_text(json.dumps({"resources": ["../../base"], "components": named}))
    rendered = render(helm, values)
    assert in_order(rendered) == in_order(built_by_kustomize(overlay))
    for one in rendered.values():
        kubernetes_validate.validate(one, kubernetes_validate.latest_version(), strict=True)
    # A variable knows only those above it.
    (container,) = rendered["StatefulSet"]["spec"]["template"]["spec"]["containers"]
    names = [one["name"] for one in container["env"]]
    assert names[:3] == ["POD_INDEX", "SHARDS", "ENGRAMPOOL_SHARD"]


def test_each_value_comes_where_it_belongs(helm):
    values = {
        "shards": 6,
        "image": {"repository": "registry.example/engrampool", "tag": "9.9.9"},
        "modelClaim": "v41",
        "cpus": 4,
        "memory": "34Gi",
        "drainSeconds": 30,
        "settings": {"ENGRAMPOOL_GATHER_THREADS": "2"},
        "nodeSelector": {"memory": "large"},
        "tolerations": [{"key": "memory", "operator": "Exists"}],
    }
    built = render(helm, values, "v41-a")
    for one in built.values():
        kubernetes_validate.validate(one, kubernetes_validate.latest_version(), strict=True)
        assert one["metadata"]["name"] == "v41-a"
    owner = built["StatefulSet"]["spec"]
    pod = owner["template"]["spec"]
    (container,) = pod["containers"]
    environment = {one["name"]: one.get("value") for one in container["env"]}
    assert (owner["replicas"], owner["serviceName"], environment["SHARDS"]) == (6, "v41-a", "6")
    assert container["image"] == "registry.example/engrampool:9.9.9"
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "v41"
    assert container["resources"]["limits"] == container["resources"]["requests"] == {"cpu": "4", "memory": "34Gi"}
    assert (environment["ENGRAMPOOL_DRAIN_S"], pod["terminationGracePeriodSeconds"]) == ("30", 80)
    assert environment["ENGRAMPOOL_GATHER_THREADS"] == "2"
    assert (pod["nodeSelector"], pod["tolerations"]) == (values["nodeSelector"], values["tolerations"])
    labels = owner["template"]["metadata"]["labels"]
    assert labels == {"app.kubernetes.io/name": "engrampool", "app.kubernetes.io/instance": "v41-a"}
    # Else a second release beside the first would take its pods.
    assert owner["selector"]["matchLabels"] == built["Service"]["spec"]["selector"] == labels
    assert built["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    assert built["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels


@pytest.mark.parametrize(
    "wrong",
    [
        {"shards": 0},
        {"shard": 4},
        {"cpus": "8"},
        {"memory": "56"},
        {"image": {"repository": ""}},
        {"settings": {"ENGRAMPOOL_SHARD": "0/4"}},
        {"settings": {"THREADS": "4"}},
        {"settings": {"ENGRAMPOOL_TOKENS": "/callers.toml"}},
        {"shm": "50"},
        {"shm": "50Gi", "hugepages": "48Gi"},
        {"tlsSecret": "engrampool-tls"},
        {"callersSecret": "engrampool-callers"},
    ],
    ids=str,
)
def test_values_that_are_wrong_are_refused(helm, wrong):
    with helm.Chart.load(str(CHART)) as chart:
        chart.validate_schema({})
        with pytest.raises(helm.HelmError):
            chart.validate_schema(wrong)


def test_helm_lint_has_nothing_to_say(helm):
    said = helm.lint(str(CHART))
    assert [one["error"] for one in said["messages"]] == ["icon is recommended"]
    assert not said["errors"]


def test_the_chart_is_of_this_version():
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (__version__, __version__)
