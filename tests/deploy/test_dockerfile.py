"""The image and the compose file: do they fit the tree, the server's settings, and each other?"""

import os
import re
import socket
import subprocess
import sys
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from certificates import Authority
from container import Container
from engrampool_client.testing import serve_process
from engrampool_server.config import ServerConfig, load_config, split_address

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
# Continued lines joined, comments dropped.
INSTRUCTIONS = [
    tuple(line.split(maxsplit=1))
    for line in re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE)).splitlines()
    if line
]
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
DEFAULTS = ServerConfig(models=(Path("/model"),))
LISTEN_PORT = split_address(DEFAULTS.listen)[1]
DIRECT_PORT = LISTEN_PORT + 1
METRICS_PORT = split_address(DEFAULTS.metrics)[1]


def instructions(name: str) -> list[str]:
    return [arguments for word, arguments in INSTRUCTIONS if word == name]


def image_environment() -> dict[str, str]:
    return dict(pair.split("=", 1) for line in instructions("ENV") for pair in line.split())


def seconds(duration: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([smh])", duration).groups()
    return int(number) * {"s": 1, "m": 60, "h": 3600}[unit]


def mounts(service: str) -> dict[str, tuple[str, bool]]:
    """Target -> (source, whether read-only) of each volume."""
    found = {}
    for volume in SERVICES[service]["volumes"]:
        if isinstance(volume, str):
            source, target, *mode = volume.split(":")
            found[target] = (source, mode == ["ro"])
        else:
            found[volume["target"]] = (volume["source"], volume["read_only"])
    return found


def read(path: str) -> Any:
    return yaml.safe_load((DEPLOY / path).read_text())


def test_hadolint_has_nothing_to_say():
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_what_the_image_copies_is_in_the_tree_and_let_through():
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert patterns[0] == "*"
    allowed = {pattern[1:] for pattern in patterns if pattern[0] == "!"}
    copied = {source for line in instructions("COPY") if not line.startswith("--from") for source in line.split()[:-1]}
    assert copied == allowed
    for source in copied:
        assert (ROOT / source).exists(), source


def test_the_image_serves_on_all_addresses_at_the_default_ports():
    environment = image_environment()
    config = load_config({}, {k: v for k, v in environment.items() if k.startswith("ENGRAMPOOL_")}, None).config
    assert config.listen == f"0.0.0.0:{LISTEN_PORT}"
    assert config.metrics == f"0.0.0.0:{METRICS_PORT}"
    # Not any free port, as is the default: it has to be published under the number that clients are told.
    assert config.direct == f"0.0.0.0:{DIRECT_PORT}"
    assert instructions("EXPOSE") == [f"{LISTEN_PORT} {DIRECT_PORT} {METRICS_PORT}"]
    assert (instructions("ENTRYPOINT"), instructions("CMD")) == (['["engrampool"]'], ['["serve"]'])


def test_the_image_runs_as_nobody_special():
    (user,) = instructions("USER")
    uid, gid = map(int, user.split(":"))
    assert uid >= 1000
    assert gid >= 1000
    # Nothing after it could take the user back.
    assert {word for word, _ in INSTRUCTIONS[INSTRUCTIONS.index(("USER", user)) + 1 :]} == {
        "EXPOSE",
        "HEALTHCHECK",
        "ENTRYPOINT",
        "CMD",
    }


def test_the_image_has_kernels_for_every_processor_and_user():
    stages = DOCKERFILE.split("\nFROM ")
    assert "/opt/engrampool/bin/python -m engrampool_proto.kernels.jit" in stages[1]
    # Within what is copied as a whole, belongs to root, and is nobody's to write to.
    assert "COPY --from=build /opt/engrampool /opt/engrampool" in stages[2]
    assert "NUMBA" not in DOCKERFILE


def check_health(listen: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run what the image's HEALTHCHECK runs; a proxy in the environment must not matter."""
    environ = {**os.environ, "ENGRAMPOOL_LISTEN": listen, "http_proxy": "http://127.0.0.1:9", **variables}
    command = [sys.executable, str(DEPLOY / "healthcheck.py")]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300)


def test_the_health_check_passes_a_server_that_serves(server):
    port = split_address(server.address)[1]
    done = check_health(f"0.0.0.0:{port}")
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_health_check_fails_a_server_that_is_loading():
    servicer = health.HealthServicer()
    servicer.set("engrampool.v1.Pool", health_pb2.HealthCheckResponse.NOT_SERVING)
    running = grpc.server(futures.ThreadPoolExecutor(1))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, running)
    port = running.add_insecure_port("127.0.0.1:0")
    running.start()
    try:
        done = check_health(f"127.0.0.1:{port}")
    finally:
        running.stop(None).wait()
    assert done.returncode == 1
    assert done.stderr == f"127.0.0.1:{port}: NOT_SERVING\n"


def test_the_health_check_fails_where_nobody_listens():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and never listens
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = check_health(address)
    assert done.returncode == 1
    assert done.stderr.startswith(f"{address}: UNAVAILABLE")


def test_compose_serves_the_model_where_the_image_looks_for_it():
    service = SERVICES["engrampool"]
    assert (DEPLOY / service["build"]["context"] / "Dockerfile").samefile(ROOT / "Dockerfile")
    source, read_only = mounts("engrampool")[image_environment()["ENGRAMPOOL_MODELS"]]
    assert source.startswith("${MODEL_DIR:?")
    assert read_only
    published = [port.split(":")[-2:] for port in service["ports"]]
    assert published == [[str(port)] * 2 for port in (LISTEN_PORT, DIRECT_PORT)]
    assert service["ulimits"]["memlock"] == -1
    # Read with the image's, as the container would.
    config = load_config({}, {**image_environment(), **service["environment"]}, None).config
    assert seconds(service["stop_grace_period"]) > config.drain_s
    # The image's command is kept.
    assert instructions("HEALTHCHECK")
    assert not {"test", "disable"} & service["healthcheck"].keys()


@pytest.mark.parametrize("service", ["prometheus", "grafana"])
def test_compose_pins_images_and_publishes_nothing_beyond_loopback(service):
    assert re.fullmatch(r"[a-z/]+:v?\d+\.\d+\.\d+", SERVICES[service]["image"])
    assert all(port.startswith("127.0.0.1:") for port in SERVICES[service]["ports"])


def test_compose_mounts_what_is_in_the_tree():
    named = set(COMPOSE["volumes"])
    for service in ("prometheus", "grafana"):
        for target, (source, read_only) in mounts(service).items():
            if source in named:
                continue
            assert (DEPLOY / source).exists(), f"{service}: {source} -> {target}"
            assert read_only


def test_prometheus_scrapes_the_service():
    config = read("prometheus/prometheus.yml")
    (job,) = config["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"engrampool:{METRICS_PORT}"]}]
    assert "engrampool" in SERVICES
    # The whole folder, as rules are named relative to prometheus.yml.
    assert mounts("prometheus")["/etc/prometheus"] == ("./prometheus", True)


def test_grafana_finds_prometheus_and_the_dashboard():
    (datasource,) = read("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    port = SERVICES["prometheus"]["ports"][0].rpartition(":")[2]
    assert datasource["url"] == f"http://prometheus:{port}"
    # $__rate_interval is made of it: with another, rates would have gaps.
    assert datasource["jsonData"]["timeInterval"] == read("prometheus/prometheus.yml")["global"]["scrape_interval"]
    (provider,) = read("grafana/provisioning/dashboards/engrampool.yaml")["providers"]
    source, _ = mounts("grafana")[provider["options"]["path"]]
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (DEPLOY / source / Path(home).relative_to(provider["options"]["path"])).is_file()
    assert mounts("grafana")["/etc/grafana/provisioning"] == ("./grafana/provisioning", True)


def test_grafana_lets_everybody_look_and_nobody_change():
    environment = SERVICES["grafana"]["environment"]
    assert environment["GF_AUTH_ANONYMOUS_ENABLED"] == "true"
    assert environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    # The account that Grafana makes has a password that everybody knows.
    assert environment["GF_AUTH_DISABLE_LOGIN_FORM"] == "true"
    assert environment["GF_AUTH_BASIC_ENABLED"] == "false"


# Whoever the platform makes of it: the image's user, or any number in the group of root, as OpenShift does.
@pytest.mark.parametrize("user", [None, (1_234_567, 0)], ids=["the image's user", "any user"])
def test_the_server_starts_as_compose_starts_it(serves, to_mount, user):
    service = SERVICES["engrampool"]
    imposed = {"read_only", "cap_drop", "security_opt", "shm_size", "ulimits", "volumes", "environment"}
    other = {"build", "image", "init", "restart", "ports", "stop_grace_period", "healthcheck"}
    assert service.keys() == imposed | other, "is there something new to impose?"
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["ulimits"] == {"memlock": -1}
    (volume,) = service["volumes"]
    (image_user,) = instructions("USER")
    mebibytes = re.fullmatch(r"(\d+)m", service["shm_size"])[1]
    serves(
        Container(
            {**image_environment(), **service["environment"]},
            user or tuple(map(int, image_user.split(":"))),
            mounts={volume["target"]: f"--bind -o {'ro' if volume['read_only'] else 'rw'} {to_mount}"},
            shm_bytes=int(mebibytes) << 20,
            unlimited_memlock=True,
        )
    )


# --- with TLS and tokens

TLS_COMPOSE = yaml.safe_load((DEPLOY / "tls/compose.yaml").read_text())["services"]


def test_the_variant_with_tls_changes_settings_and_mounts_alone():
    assert {name: set(service) for name, service in TLS_COMPOSE.items()} == {
        "engrampool": {"environment", "volumes"},
        "prometheus": {"command", "volumes"},
    }
    both = {**SERVICES["engrampool"]["environment"], **TLS_COMPOSE["engrampool"]["environment"]}
    config = load_config({}, {**image_environment(), **both}, None).config
    (volume,) = TLS_COMPOSE["engrampool"]["volumes"]
    files = {Path(one) for one in (config.tls_cert, config.tls_key, config.tokens)}
    assert {str(one.parent) for one in files} == {volume["target"]}
    assert volume["read_only"]
    assert (config.lane, config.lane_tls) == (f"0.0.0.0:{DIRECT_PORT}", "on")


def test_prometheus_of_the_variant_with_tls_scrapes_by_https_with_a_token():
    mounted = dict(volume.split(":")[1::-1] for volume in TLS_COMPOSE["prometheus"]["volumes"])
    (where,) = [word for word in TLS_COMPOSE["prometheus"]["command"] if word.startswith("--config.file=")]
    config = read(mounted[where.partition("=")[2]].removeprefix("./"))
    plain = read("prometheus/prometheus.yml")
    (job,), (plain_job,) = config["scrape_configs"], plain["scrape_configs"]
    trust = {key: job[key] for key in ("scheme", "tls_config", "authorization")}
    assert job == plain_job | trust
    assert (job["scheme"], config["rule_files"]) == ("https", plain["rule_files"])
    for path in (job["tls_config"]["ca_file"], job["authorization"]["credentials_file"]):
        assert str(Path(path).parent) in mounted
    folder = Path(where.partition("=")[2]).parent
    for rules in config["rule_files"]:
        assert (DEPLOY / mounted[str(folder / rules)]).exists()


@pytest.mark.parametrize("metrics", ["true", "false"])
def test_the_health_check_of_a_server_with_tls_asks_its_metrics_port(packed, tmp_path, metrics):
    authority = Authority(tmp_path)
    settings = {**authority.of_server(), "tls_client_ca": authority.ca}
    environ = {"ENGRAMPOOL_TLS_METRICS": metrics}
    with serve_process(packed, environ=environ, workers=1, **settings) as server:
        asked = {"ENGRAMPOOL_METRICS": f"0.0.0.0:{server.metrics_address.rpartition(':')[2]}", **environ}
        done = check_health("0.0.0.0:1", ENGRAMPOOL_TLS_CERT="/server.pem", **asked)
        assert (done.returncode, done.stdout + done.stderr) == (0, "")
    done = check_health("0.0.0.0:1", ENGRAMPOOL_TLS_CERT="/server.pem", **asked)
    assert done.returncode == 1
    assert "refused" in done.stderr
