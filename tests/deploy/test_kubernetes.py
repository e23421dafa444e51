"""The manifests, built by real kustomize (kubectl's), against Kubernetes' schemas, the image, and the server's code."""

import copy
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import jsonschema
import kubernetes_validate
import numpy as np
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from container import Container
from engrampool_client import Client
from engrampool_proto import __version__
from engrampool_proto.errors import EngrampoolError
from engrampool_server.config import ServerConfig, load_config, split_address
from engrampool_server.files.sources import Url
from engrampool_server.machine import Machine, Room
from engrampool_server.memory.preflight import Need, check
from engrampool_server.processes import children, supervisor
from server_fixtures import PATIENCE, serve_thread

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy/kubernetes"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
GUIDE = (ROOT / "docs/KUBERNETES.md").read_text()
# The first with the label of the index, the sleep of preStop and matchLabelKeys turned on; and the newest known here.
VERSIONS = ("1.31", kubernetes_validate.latest_version())
# Rows of DeepSeek-V4.1, in two tables: 768 022 850 of 264 bytes.
V41_BYTES, V41_TABLES = 768_022_850 * 264, 2
# What a container has for /dev/shm where nothing is mounted there.
RUNTIME_SHM_BYTES = 64 << 20
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")

# What we use of the Prometheus operator's kinds (its CRDs, monitoring.coreos.com/v1); rules are promtool's to judge.
DURATION = {"type": "string", "pattern": "^[0-9]+(ms|[smhdwy])$"}
STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}


def closed(required: str, **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


ALERT = closed("alert expr", alert={"type": "string"}, expr={"type": "string"}, labels=STRINGS, annotations=STRINGS)
ALERT["properties"]["for"] = DURATION
RULE = {"anyOf": [ALERT, closed("record expr", record={"type": "string"}, expr={"type": "string"}, labels=STRINGS)]}
RELABELING = closed(
    "targetLabel", sourceLabels={"type": "array", "items": {"type": "string"}}, targetLabel={"type": "string"}
)
ENDPOINT = closed(
    "port",
    port={"type": "string"},
    interval=DURATION,
    scrapeTimeout=DURATION,
    relabelings={"type": "array", "items": RELABELING},
)
OPERATOR_SPECS = {
    "PrometheusRule": closed(
        "groups",
        groups={
            "type": "array",
            "items": closed("name rules", name={"type": "string"}, rules={"type": "array", "items": RULE}),
        },
    ),
    "ServiceMonitor": closed(
        "endpoints selector",
        jobLabel={"type": "string"},
        selector=closed("matchLabels", matchLabels=STRINGS),
        endpoints={"type": "array", "items": ENDPOINT},
    ),
}

Manifest = dict[str, Any]
Build = list[Manifest]


def kustomize(directory: Path) -> Build:
    kubectl = Path(sys.executable).parent / "kubectl"
    done = subprocess.run([kubectl, "kustomize", directory], capture_output=True, text=True, timeout=300)
    # It warns there of what is deprecated.
    assert (done.returncode, done.stderr) == (0, ""), f"{directory}: {done.stderr}"
    return list(yaml.safe_load_all(done.stdout))


def blocks(kind: str) -> list[str]:
    """The guide's examples of one kind."""
    found = [textwrap.dedent(text) for text in re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)]
    return [text for text in found if yaml.safe_load(text)["kind"] == kind]


def overlay(text: str) -> Build:
    """What somebody's own overlay, beside ours, gives."""
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory) / "kubernetes"
        shutil.copytree(KUBERNETES, tree)
        own = tree / "overlays/own"
        own.mkdir()
        (own / "kustomization.yaml").write_text(text)
        return kustomize(own)


@functools.cache
def cached_build(name: str) -> Build:
    if name.startswith("guide-"):
        return overlay(blocks("Kustomization")[int(name[6:])])
    return kustomize(KUBERNETES / name)


def build(name: str) -> Build:
    return copy.deepcopy(cached_build(name))


BUILDS = [
    "base",
    *sorted(f"overlays/{path.name}" for path in (KUBERNETES / "overlays").iterdir()),
    *(f"guide-{number}" for number in range(len(blocks("Kustomization")))),
]
(WITH_TLS,) = (f"guide-{at}" for at, text in enumerate(blocks("Kustomization")) if "components/tls" in text)
EACH = pytest.mark.parametrize("name", BUILDS)


def of_kind(built: Build, kind: str) -> list[Manifest]:
    return [one for one in built if one["kind"] == kind]


def only(built: Build, kind: str) -> Manifest:
    (one,) = of_kind(built, kind)
    return one


def selects(selector: Manifest, labels: dict[str, str]) -> bool:
    """As Kubernetes reads a label selector."""
    assert selector.keys() <= {"matchLabels", "matchExpressions"}
    for expression in selector.get("matchExpressions", []):
        assert expression["operator"] == "In"
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return selector.get("matchLabels", {}).items() <= labels.items()


@dataclass(frozen=True)
class Pod:
    """One that the StatefulSet controller would make of a template, in which it is the number `index` of `shards`."""

    owner: str
    index: int
    shards: int
    labels: dict[str, str]
    spec: Manifest

    @property
    def container(self) -> Manifest:
        (container,) = self.spec["containers"]
        return container

    def environment(self) -> dict[str, str]:
        """The image's variables, and ours over them, expanded as the kubelet does: in order."""
        found = dict(IMAGE)
        ours: dict[str, str] = {}
        for variable in self.container["env"]:
            if "valueFrom" in variable:
                path = variable["valueFrom"]["fieldRef"]["fieldPath"]
                value = self.labels[re.fullmatch(r"metadata\.labels\['(.+)'\]", path)[1]]
            else:
                value = re.sub(r"\$\((\w+)\)", lambda match: ours.get(match[1], match[0]), variable["value"])
            ours[variable["name"]] = value
        return found | ours

    def config(self) -> ServerConfig:
        return load_config({}, {"ENGRAMPOOL_WORKERS": self.limit("cpu"), **self.environment()}, None).config

    def limit(self, resource: str) -> str:
        return self.container["resources"]["limits"][resource]

    def mounts(self) -> dict[str, Manifest]:
        """Path -> volume."""
        volumes = {volume["name"]: volume for volume in self.spec["volumes"]}
        paths = {mount["mountPath"]: volumes.pop(mount["name"]) for mount in self.container["volumeMounts"]}
        assert not volumes, "never mounted"
        return paths


def pods(built: Build) -> Iterator[Pod]:
    for owner in of_kind(built, "StatefulSet"):
        spec, name = owner["spec"], owner["metadata"]["name"]
        for index in range(spec["replicas"]):
            labels = {
                **spec["template"]["metadata"]["labels"],
                "apps.kubernetes.io/pod-index": str(index),
                "statefulset.kubernetes.io/pod-name": f"{name}-{index}",
            }
            yield Pod(name, index, spec["replicas"], labels, spec["template"]["spec"])


def image_environment() -> dict[str, str]:
    last = DOCKERFILE.replace("\\\n", " ").rpartition("\nFROM ")[2]
    return dict(pair.split("=", 1) for line in re.findall(r"^ENV (.*)", last, re.MULTILINE) for pair in line.split())


IMAGE = image_environment()


def ports(config: ServerConfig) -> dict[str, int]:
    addresses = {"grpc": config.listen, "direct": config.direct, "metrics": config.metrics}
    return {name: split_address(address)[1] for name, address in addresses.items() if address != "off"}


def quantity(text: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(Ki|Mi|Gi|)", text).groups()
    return int(number) << {"": 0, "Ki": 10, "Mi": 20, "Gi": 30}[unit]


# --- what no schema knows: each of these raises AssertionError for a build that is wrong


@functools.cache
def follows_schema(text: str, version: str) -> None:
    """Each object once, as most are in several builds, and schemas are read again each time."""
    kubernetes_validate.validate(json.loads(text), version, strict=True)


def check_schemas(built: Build) -> None:
    for one in built:
        if one["kind"] in OPERATOR_SPECS:
            assert one.keys() == {"apiVersion", "kind", "metadata", "spec"}
            assert one["apiVersion"] == "monitoring.coreos.com/v1"
            try:
                jsonschema.validate(one["spec"], OPERATOR_SPECS[one["kind"]])
            except jsonschema.ValidationError as error:
                raise AssertionError(error.message) from error
            continue
        for version in VERSIONS:
            try:
                follows_schema(json.dumps(one), version)
            except kubernetes_validate.ValidationError as error:
                raise AssertionError(f"{one['kind']}, {version}: {error.message}") from error


def check_settings(built: Build) -> None:
    """The server would start with every pod's variables: it refuses names and values that it does not know."""
    for pod in pods(built):
        pod.config()
        assert not pod.spec["enableServiceLinks"]


def check_shards(built: Build) -> None:
    for pod in pods(built):
        assert pod.environment()["ENGRAMPOOL_SHARD"] == f"{pod.index}/{pod.shards}", pod.owner


def check_image(built: Build) -> None:
    (user,) = re.findall(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE)
    for pod in pods(built):
        context = pod.spec["securityContext"]
        assert (context["runAsUser"], context["runAsGroup"]) == tuple(map(int, user))
        assert pod.container["image"].rpartition(":")[2] == __version__
        assert not {"command", "args"} & pod.container.keys()


def check_restricted(built: Build) -> None:
    """The Pod Security Standard `restricted`, no token, and nothing written but to volumes."""
    accounts = {one["metadata"]["name"]: one for one in of_kind(built, "ServiceAccount")}
    for pod in pods(built):
        context = pod.spec["securityContext"]
        assert context["runAsNonRoot"]
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        own = pod.container["securityContext"]
        assert not own["allowPrivilegeEscalation"]
        assert own["readOnlyRootFilesystem"]
        assert own["capabilities"] == {"drop": ["ALL"]}
        assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & pod.spec.keys()
        for volume in pod.spec["volumes"]:
            assert volume.keys() <= {"name", "emptyDir", "persistentVolumeClaim", "secret"}
        assert not pod.spec["automountServiceAccountToken"]
        assert not accounts[pod.spec["serviceAccountName"]]["automountServiceAccountToken"]


def check_ports(built: Build) -> None:
    for pod in pods(built):
        wanted = ports(pod.config())
        named = {port["name"]: port["containerPort"] for port in pod.container["ports"]}
        assert named == wanted
        for probe in PROBES:
            if pod.config().tls_cert == "off":
                assert pod.container[probe]["grpc"]["port"] == wanted["grpc"]
            else:  # of which the kubelet knows nothing for gRPC
                asked = pod.container[probe]["httpGet"]
                assert (asked["scheme"], asked["port"], "grpc" in pod.container[probe]) == ("HTTPS", "metrics", False)
        for service in of_kind(built, "Service"):
            published = {port["name"]: (port["port"], port["targetPort"]) for port in service["spec"]["ports"]}
            # Clients are told the direct lane's number, and a headless Service translates none.
            assert published == {name: (number, name) for name, number in wanted.items()}
        for policy in of_kind(built, "NetworkPolicy"):
            opened = [{port["port"] for port in rule["ports"]} for rule in policy["spec"]["ingress"]]
            assert opened == [set(wanted.values()) - {wanted["metrics"]}, {wanted["metrics"]}]


def check_probes(built: Build) -> None:
    for pod in pods(built):
        startup, readiness, liveness = (pod.container[probe] for probe in PROBES)
        if pod.config().tls_cert == "off":
            assert startup["grpc"]["service"] == readiness["grpc"]["service"] == "engrampool.v1.Pool"
            assert liveness["grpc"]["service"] == ""
        else:
            paths = [probe["httpGet"]["path"] for probe in (startup, readiness, liveness)]
            assert paths == ["/readyz", "/readyz", "/healthz"]
        # Both cover the loading of tables.
        (start_hours,) = re.findall(r"--start-period=(\d+)h", DOCKERFILE)
        assert patience_s(startup) >= int(start_hours) * 3600
        # The supervisor heals a worker that hangs; a restart from outside costs the tables.
        assert patience_s(liveness) > pod.config().worker_timeout_s + children.START_TIMEOUT_S
        for probe in (startup, readiness, liveness):
            assert probe["timeoutSeconds"] < probe["periodSeconds"]


def patience_s(probe: Manifest) -> int:
    return probe["periodSeconds"] * probe["failureThreshold"]


def check_selectors(built: Build) -> None:
    everyone = list(pods(built))
    services = {one["metadata"]["name"]: one["spec"] for one in of_kind(built, "Service")}
    for owner in of_kind(built, "StatefulSet"):
        spec = owner["spec"]
        mine = [pod for pod in everyone if selects(spec["selector"], pod.labels)]
        assert {pod.owner for pod in mine} == {owner["metadata"]["name"]}
        service = services[spec["serviceName"]]
        assert service["clusterIP"] == "None"
        assert not service["publishNotReadyAddresses"]
        assert all(service["selector"].items() <= pod.labels.items() for pod in mine)
        for constraint in spec["template"]["spec"]["topologySpreadConstraints"]:
            assert all(selects(constraint["labelSelector"], pod.labels) for pod in mine)
    budget, policy = only(built, "PodDisruptionBudget")["spec"], only(built, "NetworkPolicy")["spec"]
    # One budget for all, or each set might lose its server of the same shard.
    assert budget["maxUnavailable"] == 1
    for pod in everyone:
        assert selects(budget["selector"], pod.labels)
        assert selects(policy["podSelector"], pod.labels)


def check_network(built: Build) -> None:
    """Workers and Prometheus may come in by their own labels, which are none of the servers'; nothing else goes out."""
    spec = only(built, "NetworkPolicy")["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    # Names and a store, where tables are read from one.
    reads_store = any(isinstance(model, Url) for pod in pods(built) for model in pod.config().models)
    assert [{port["port"] for port in rule["ports"]} for rule in spec["egress"]] == [{53, 443}] * reads_store
    workers, prometheus = ([peer] for rule in spec["ingress"] for (peer,) in [rule["from"]])
    assert [peer.keys() for peer in workers + prometheus] == [{"podSelector"}, {"podSelector", "namespaceSelector"}]
    assert selects(workers[0]["podSelector"], {"engrampool-client": "true"})
    assert selects(prometheus[0]["podSelector"], {"app.kubernetes.io/name": "prometheus"})
    assert not any(selects(peer["podSelector"], {"app.kubernetes.io/name": "vllm"}) for peer in workers + prometheus)


def check_guaranteed(built: Build) -> None:
    for pod in pods(built):
        resources = pod.container["resources"]
        assert resources["requests"] == resources["limits"]
        assert {"cpu", "memory"} <= resources["limits"].keys()
        # Whole ones, or none can be the pod's own.
        assert resources["limits"]["cpu"].isdigit()


def check_grace(built: Build) -> None:
    for pod in pods(built):
        sleep_s = pod.container["lifecycle"]["preStop"]["sleep"]["seconds"]
        needed_s = sleep_s + pod.config().drain_s + supervisor._STOP_MARGIN_S
        assert pod.spec["terminationGracePeriodSeconds"] > needed_s


def check_volumes(built: Build) -> None:
    for pod in pods(built):
        config, mounts = pod.config(), pod.mounts()
        claims = {path for path, volume in mounts.items() if "persistentVolumeClaim" in volume}
        assert claims == {str(model) for model in config.models if not isinstance(model, Url)}
        assert all(mounts[path]["persistentVolumeClaim"]["readOnly"] for path in claims)
        assert "emptyDir" in mounts["/tmp"]
        media = {path: volume["emptyDir"].get("medium") for path, volume in mounts.items() if "emptyDir" in volume}
        assert (media.get("/dev/shm") == "Memory") == (config.memory == "shm")
        assert (media.get("/dev/hugepages") == "HugePages") == (config.memory == "hugetlb")
        # What the user may write to a hugetlbfs by.
        assert pod.spec["securityContext"]["fsGroup"] == pod.spec["securityContext"]["runAsGroup"]


def check_secrets(built: Build) -> None:
    """Each file that a setting names is in a Secret, in a directory of its own that nobody writes to."""
    for pod in pods(built):
        config = pod.config()
        files = {Path(one) for one in (config.tls_cert, config.tls_key, config.tls_client_ca, config.tokens)}
        secrets = {path for path, volume in pod.mounts().items() if "secret" in volume}
        assert {str(one.parent) for one in files - {Path("off")}} == secrets
        mounts = [mount for mount in pod.container["volumeMounts"] if mount["mountPath"] in secrets]
        assert all(mount["readOnly"] and "subPath" not in mount for mount in mounts)
        (service,) = of_kind(built, "Service")
        (grpc_port,) = (port for port in service["spec"]["ports"] if port["name"] == "grpc")
        assert grpc_port["appProtocol"] == ("kubernetes.io/h2c" if config.tls_cert == "off" else "https")


def check_preflight(built: Build) -> None:
    """The server's own: a shard of V4.1 fits the pod's limits and volumes."""
    for pod in pods(built):
        config, shm = pod.config(), pod.mounts().get("/dev/shm")
        huge_bytes = quantity(pod.container["resources"]["limits"].get("hugepages-2Mi", "0"))
        machine = replace(
            Machine.read(),
            mem_available_bytes=None,
            memory_room=Room("/pod", quantity(pod.limit("memory"))),
            shm_available_bytes=quantity(shm["emptyDir"]["sizeLimit"]) if shm else RUNTIME_SHM_BYTES,
            huge_page_bytes=2 << 20,
            huge_pages_total=huge_bytes >> 21,
            huge_pages_available=huge_bytes >> 21,
            huge_page_room=Room("/pod", huge_bytes),
        )
        assert not config.lock_memory, "a container's hard limit is nothing that a manifest could raise"
        report = check(need(pod.shards, config), config.memory, False, machine)
        assert report.ok, str(report)
        if shm:
            assert quantity(shm["emptyDir"]["sizeLimit"]) < quantity(pod.limit("memory"))


def need(shards: int, config: ServerConfig) -> Need:
    """What a shard of V4.1 needs, where they are equal: its 48 heads are, but for some rows."""
    return Need(
        -(-V41_BYTES // shards),
        files=8,
        tables=V41_TABLES,
        answer_bytes=config.max_in_flight_bytes,
        workers=config.workers,
    )


def check_replicas(built: Build) -> None:
    """Servers of one shard are never on one node, and are never updated by one `kubectl apply`."""
    everyone = list(pods(built))
    for pod in everyone:
        for other in everyone:
            if other.owner != pod.owner:
                assert keeps_away(pod, other) == (other.index == pod.index)
    at_once = [
        owner
        for owner in of_kind(built, "StatefulSet")
        if owner["spec"]["updateStrategy"].get("rollingUpdate", {}).get("partition", 0) < owner["spec"]["replicas"]
    ]
    assert len(at_once) == 1


def keeps_away(pod: Pod, other: Pod) -> bool:
    """Whether the scheduler keeps `pod` off the node of `other`, whatever it costs."""
    affinity = pod.spec.get("affinity", {}).get("podAntiAffinity", {})
    return any(
        term["topologyKey"] == "kubernetes.io/hostname"
        and selects(term["labelSelector"], other.labels)
        and all(pod.labels[key] == other.labels[key] for key in term.get("matchLabelKeys", []))
        for term in affinity.get("requiredDuringSchedulingIgnoredDuringExecution", [])
    )


def check_monitoring(built: Build) -> None:
    for monitor in of_kind(built, "ServiceMonitor"):
        (service,) = of_kind(built, "Service")
        assert selects(monitor["spec"]["selector"], service["metadata"]["labels"])
        (endpoint,) = monitor["spec"]["endpoints"]
        assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
        # The rules' job.
        assert service["metadata"]["labels"][monitor["spec"]["jobLabel"]] == "engrampool"


CHECKS: dict[str, Callable[[Build], None]] = {
    name.removeprefix("check_"): value for name, value in list(globals().items()) if name.startswith("check_")
}


@EACH
@pytest.mark.parametrize("which", CHECKS)
def test_what_is_built_is_right(which, name):
    CHECKS[which](build(name))


# --- and each of them can fail


def container(built: Build) -> Manifest:
    return of_kind(built, "StatefulSet")[-1]["spec"]["template"]["spec"]["containers"][0]


def pod_spec(built: Build) -> Manifest:
    return of_kind(built, "StatefulSet")[-1]["spec"]["template"]["spec"]


def spec(built: Build, kind: str) -> Manifest:
    return of_kind(built, kind)[-1]["spec"]


def set_variable(name: str, value: str) -> Callable[[Build], None]:
    def change(built: Build) -> None:
        variables = container(built)["env"]
        variables[:] = [one for one in variables if one["name"] != name] + [{"name": name, "value": value}]

    return change


MUTATIONS: list[tuple[str, str, Callable[[Build], Any]]] = [
    ("schemas", "base", lambda b: pod_spec(b).update(hostnetwork=True)),
    ("schemas", "base", lambda b: container(b)["readinessProbe"]["grpc"].update(port="50051")),
    ("schemas", "base", lambda b: spec(b, "PodDisruptionBudget").update(maxUnavalable=1)),
    ("schemas", "overlays/monitoring", lambda b: spec(b, "ServiceMonitor")["endpoints"][0].update(ports="x")),
    ("schemas", "overlays/monitoring", lambda b: spec(b, "PrometheusRule")["groups"][0]["rules"][0].update(four="5m")),
    ("settings", "base", set_variable("ENGRAMPOOL_DRAIN", "10")),
    ("settings", "base", set_variable("ENGRAMPOOL_DRAIN_S", "-1")),
    ("settings", "base", set_variable("ENGRAMPOOL_SHARD", "4/4")),
    ("settings", "base", lambda b: pod_spec(b).update(enableServiceLinks=True)),
    ("shards", "base", lambda b: spec(b, "StatefulSet").update(replicas=5)),
    ("shards", "base", set_variable("SHARDS", "4")),  # below what reads it
    ("shards", "base", set_variable("ENGRAMPOOL_SHARD", "$(INDEX)/$(SHARDS)")),
    ("image", "base", lambda b: pod_spec(b)["securityContext"].update(runAsUser=1000)),
    ("image", "base", lambda b: container(b).update(image="engrampool:latest")),
    ("restricted", "base", lambda b: container(b)["securityContext"].pop("readOnlyRootFilesystem")),
    ("restricted", "base", lambda b: container(b)["securityContext"]["capabilities"].update(add=["IPC_LOCK"])),
    ("restricted", "base", lambda b: pod_spec(b)["volumes"].append({"name": "x", "hostPath": {"path": "/dev/shm"}})),
    ("restricted", "base", lambda b: of_kind(b, "ServiceAccount")[0].update(automountServiceAccountToken=True)),
    ("ports", "base", set_variable("ENGRAMPOOL_DIRECT", "0.0.0.0:50053")),
    ("ports", "base", lambda b: spec(b, "Service")["ports"][1].update(port=443)),
    ("ports", "base", lambda b: container(b)["livenessProbe"]["grpc"].update(port=50052)),
    ("ports", "base", lambda b: spec(b, "NetworkPolicy")["ingress"][0]["ports"].pop()),
    ("probes", "base", lambda b: container(b)["readinessProbe"]["grpc"].update(service="")),
    ("probes", "base", lambda b: container(b)["livenessProbe"].update(failureThreshold=3)),
    ("probes", "base", lambda b: container(b)["startupProbe"].update(failureThreshold=30)),
    ("selectors", "base", lambda b: spec(b, "Service").update(publishNotReadyAddresses=True)),
    ("selectors", "base", lambda b: spec(b, "StatefulSet").update(serviceName="pool")),
    ("selectors", "overlays/replicas", lambda b: spec(b, "StatefulSet")["selector"]["matchLabels"].popitem()),
    ("selectors", "overlays/replicas", lambda b: spec(b, "Service")["selector"].update({"engrampool-set": "a"})),
    (
        "selectors",
        "overlays/replicas",
        lambda b: spec(b, "PodDisruptionBudget")["selector"]["matchLabels"].update({"engrampool-set": "a"}),
    ),
    ("network", "base", lambda b: spec(b, "NetworkPolicy")["ingress"][0].update({"from": [{"podSelector": {}}]})),
    (
        "network",
        "base",
        lambda b: spec(b, "NetworkPolicy")["ingress"][0]["from"][0]["podSelector"].update(
            matchLabels={"app.kubernetes.io/instance": "engrampool"}
        ),
    ),
    ("network", "base", lambda b: spec(b, "NetworkPolicy").update(policyTypes=["Ingress"])),
    ("network", "base", lambda b: spec(b, "NetworkPolicy").update(egress=[{}])),
    ("network", "overlays/object-store", lambda b: spec(b, "NetworkPolicy").update(egress=[])),
    ("guaranteed", "base", lambda b: container(b)["resources"]["requests"].update(memory="8Gi")),
    ("guaranteed", "overlays/hugepages", lambda b: container(b)["resources"]["requests"].pop("hugepages-2Mi")),
    ("grace", "base", set_variable("ENGRAMPOOL_DRAIN_S", "50")),
    ("volumes", "base", set_variable("ENGRAMPOOL_MODELS", "/model:/other")),
    ("volumes", "base", set_variable("ENGRAMPOOL_MEMORY", "shm")),
    ("volumes", "base", lambda b: container(b)["volumeMounts"].pop()),
    ("secrets", "base", set_variable("ENGRAMPOOL_TOKENS", "/callers/callers.toml")),
    ("secrets", WITH_TLS, set_variable("ENGRAMPOOL_TLS_KEY", "/keys/tls.key")),
    ("secrets", WITH_TLS, lambda b: [mount.pop("readOnly", None) for mount in container(b)["volumeMounts"]]),
    ("secrets", WITH_TLS, lambda b: spec(b, "Service")["ports"][0].update(appProtocol="kubernetes.io/h2c")),
    ("ports", WITH_TLS, lambda b: container(b)["startupProbe"]["httpGet"].update(scheme="HTTP")),
    ("probes", WITH_TLS, lambda b: container(b)["readinessProbe"]["httpGet"].update(path="/healthz")),
    ("preflight", "base", lambda b: container(b)["resources"]["limits"].update(memory="48Gi")),
    ("preflight", "overlays/shm", lambda b: pod_spec(b)["volumes"][0]["emptyDir"].update(sizeLimit="40Gi")),
    (
        "preflight",
        "overlays/hugepages",
        lambda b: container(b)["resources"]["limits"].update({"hugepages-2Mi": "47Gi"}),
    ),
    ("replicas", "overlays/replicas", lambda b: pod_spec(b).pop("affinity")),
    (
        "replicas",
        "overlays/replicas",
        lambda b: [
            term.pop("matchLabelKeys")
            for term in pod_spec(b)["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        ],
    ),
    ("replicas", "overlays/replicas", lambda b: spec(b, "StatefulSet").update(updateStrategy={"type": "OnDelete"})),
    (
        "monitoring",
        "overlays/monitoring",
        lambda b: spec(b, "ServiceMonitor").update(jobLabel="app.kubernetes.io/part"),
    ),
    ("monitoring", "overlays/monitoring", lambda b: spec(b, "ServiceMonitor")["endpoints"][0].update(port="prom")),
]


@pytest.mark.parametrize(("which", "name", "spoil"), MUTATIONS)
def test_a_check_can_fail(which, name, spoil):
    built = build(name)
    CHECKS[which](built)
    spoil(built)
    with pytest.raises((AssertionError, KeyError, ValueError)):
        CHECKS[which](built)


def test_every_check_was_seen_to_fail():
    assert {which for which, *_ in MUTATIONS} == CHECKS.keys()


# --- and the rest


def test_a_server_serves_what_the_probes_ask_for(server):
    asked = {container(build("base"))[probe]["grpc"]["service"] for probe in PROBES}
    with grpc.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in asked:
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=60)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING, service


def test_the_pods_of_a_set_hold_the_model_together(packed):
    """Servers with the pods' settings, apart from addresses and sizes: a client finds every row among them."""
    tokens = np.arange(64, dtype=np.int32)
    with ExitStack() as stack:
        addresses = []
        for pod in pods(build("base")):
            settings = vars(pod.config()) | {"listen": "127.0.0.1:0", "direct": "auto", "metrics": "off"}
            del settings["models"]
            addresses.append(stack.enter_context(serve_thread(packed, **settings)))
        expected = stack.enter_context(serve_thread(packed))
        rows = [stack.enter_context(Client(target, **PATIENCE)).lookup(tokens) for target in (addresses, expected)]
        assert rows[0].keys() == rows[1].keys()
        for layer in rows[0]:
            np.testing.assert_array_equal(rows[0][layer], rows[1][layer])
        with pytest.raises(EngrampoolError, match="no server holds rows 0"):
            Client(addresses[1:], connect_timeout_s=6)


def test_the_shards_are_counted_from_0():
    shards = [pod.environment()["ENGRAMPOOL_SHARD"] for pod in pods(build("base"))]
    assert shards == ["0/4", "1/4", "2/4", "3/4"]


def test_overlays_change_what_they_are_for_and_nothing_else():
    base = build("base")
    for name, kinds in {
        "shm": {"StatefulSet"},
        "hugepages": {"StatefulSet"},
        "object-store": {"StatefulSet", "NetworkPolicy"},
        "monitoring": {"ServiceMonitor", "PrometheusRule"},
    }.items():
        assert {one["kind"] for one in build(f"overlays/{name}") if one not in base} == kinds
    assert [pod.config().memory for pod in pods(build("overlays/shm"))] == ["shm"] * 4
    assert [pod.config().memory for pod in pods(build("overlays/hugepages"))] == ["hugetlb"] * 4
    assert sorted(pod.environment()["ENGRAMPOOL_SHARD"] for pod in pods(build("overlays/replicas"))) == [
        f"{index}/4" for index in range(4) for _ in "ab"
    ]


def test_a_second_set_beside_the_first_shares_nothing_with_it():
    """The guide's example for another number of shards."""
    first, second = build("base"), build(f"guide-{len(blocks('Kustomization')) - 1}")
    names = [{(one["kind"], one["metadata"]["name"]) for one in built} for built in (first, second)]
    assert not names[0] & names[1]
    for mine, others in ((first, second), (second, first)):
        for pod in pods(others):
            for owner in of_kind(mine, "StatefulSet"):
                assert not selects(owner["spec"]["selector"], pod.labels)
            assert not spec(mine, "Service")["selector"].items() <= pod.labels.items()
            assert not selects(spec(mine, "PodDisruptionBudget")["selector"], pod.labels)


def test_the_guides_other_manifests_are_valid_and_named_alike():
    (claim,) = map(yaml.safe_load, blocks("PersistentVolumeClaim"))
    check_schemas([claim])
    for pod in pods(build("base")):
        assert pod.mounts()["/model"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


def test_the_guides_sizes_are_what_preflight_wants():
    (workers,) = {pod.config().workers for pod in pods(build("base"))}
    config = ServerConfig(models=(Path("/model"),), workers=workers)
    rows = re.findall(r"^\| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", GUIDE, re.MULTILINE)
    assert len(rows) >= 4
    for shards, *told in rows:
        wanted = need(int(shards), config)
        everything = wanted.table_bytes + wanted.working_bytes + wanted.page_table_bytes
        sizes = (wanted.table_bytes, everything, wanted.huge_pages(2 << 20) << 21, wanted.working_bytes)
        # Rounded up, as who gives that much must have given enough.
        assert told == [f"{-(-size * 10 >> 30) / 10:.1f}" for size in sizes], shards


def test_the_guide_speaks_of_what_there_is():
    names = {path.name for folder in ("overlays", "components") for path in (KUBERNETES / folder).iterdir()}
    assert set(re.findall(r"`(?:overlays|components)/([\w-]+)`", GUIDE)) == names
    objects = {one["metadata"]["name"] for name in BUILDS for one in build(name)}
    for named in re.findall(r"\bstatefulset[ /]([\w-]+)", GUIDE):
        assert named in objects
    for patch in re.findall(r"-p '(.*)'", GUIDE):
        json.loads(patch)


UPLOAD = """
import json, sys
from pathlib import Path
from stores import s3_server
with s3_server() as s3:
    s3.upload(Path(sys.argv[1]), sys.argv[2])
    print(json.dumps(s3.environ), flush=True)
    sys.stdin.read()
"""


def as_started(pod: Pod, model: Path) -> Container:
    """What the kubelet would make of a pod, in which `check_restricted` has found nothing else that matters."""
    context, mounts = pod.spec["securityContext"], {}
    for path, volume in pod.mounts().items():
        (mount,) = (one for one in pod.container["volumeMounts"] if one["mountPath"] == path)
        empty = volume.get("emptyDir")
        if empty is None:
            assert mount["readOnly"]
            mounts[path] = f"--bind -o ro {model}"
        elif empty.get("medium") == "HugePages":
            mounts[path] = f"-t hugetlbfs -o pagesize=2M,mode=2770,gid={context['fsGroup']} none"
        else:
            size = quantity(empty["sizeLimit"])
            mounts[path] = f"-t tmpfs -o mode=2777,gid={context['fsGroup']},size={size} none"
    user = context["runAsUser"], context["runAsGroup"]
    return Container(pod.environment(), user, (context["fsGroup"],), mounts, RUNTIME_SHM_BYTES)


@pytest.mark.parametrize("name", [name for name in BUILDS if not name.startswith("guide")])
def test_the_server_starts_as_its_pod_starts_it(place, serves, to_mount, name):
    pod = next(pods(build(name)))
    container = as_started(pod, to_mount)
    if pod.config().memory == "hugetlb" and not Machine.read().huge_pages_available:
        pytest.skip("no huge pages are reserved here: sysctl vm.nr_hugepages=8")
    if not isinstance(pod.config().models[0], Url):
        serves(container)
        return
    # A store, where the container can reach it, and the Secret with what leads there.
    where = str(pod.config().models[0]).removeprefix("s3://")
    words = [*place.network, sys.executable, "-c", UPLOAD, to_mount, where]
    environ = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    with subprocess.Popen(words, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as store:
        secret = json.loads(store.stdout.readline())
        serves(replace(container, environment={**container.environment, **secret}))
        store.stdin.close()
