"""Places the servers of a model on a Ray cluster. Ray starts, restarts and moves them; lookups never go through it.

A server is a child process of a detached actor, which ends when it does, so that Ray starts both again. The servers of
a shard are the bundles of a detached placement group with STRICT_SPREAD: when a node dies, Ray places its bundles, and
with them the actors, on nodes that have room and none of the group's other bundles.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from engrampool_proto.errors import EngrampoolError
from engrampool_server.config import ENVIRONMENT_PREFIX

# Of actors and placement groups; clients look for servers in it.
NAMESPACE = "engrampool"

# How long a server that failed before it served can be asked why, until it is started again.
_RETRY_S = 5.0
_POLL_S = 0.2
# How long `down` waits for actors to say that they are there.
_ANSWER_S = 5.0


class DeploymentError(EngrampoolError):
    """Servers cannot be placed, started or found on Ray; the text says which, and what to do."""


@dataclass(frozen=True)
class Deployment:
    """The servers of one model.

    name: of all of them; theirs begin with it.
    model: directory or URL, as every node sees it.
    replicas: servers of each shard, on different nodes.
    resources: by shard, what each of its servers takes of a node, in Ray's terms: memory in bytes.
    settings: of every server, as text, by the name that `serve` has for them.
    """

    name: str
    model: str
    replicas: int
    resources: Mapping[str, Mapping[str, float]]
    settings: Mapping[str, str]


class ShardServer:
    """The actor: runs one `engrampool serve`, on any free port of its node's address."""

    def __init__(self, deployment: dict[str, Any], shard: str) -> None:
        host = ray.util.get_node_ip_address()
        host = f"[{host}]" if ":" in host else host
        self._deployment = deployment
        self._address: str | None = None
        self._failure: str | None = None
        self._stopping = False
        settings = {"metrics": f"{host}:0", **deployment["settings"]}
        environ = {ENVIRONMENT_PREFIX + name.upper(): value for name, value in settings.items()}
        # An actor can be killed without a chance to end its child.
        command = ["setpriv", "--pdeathsig", "KILL", sys.executable, "-m", "engrampool_proto", "serve"]
        command += ["--shard", shard, "--listen", f"{host}:0", "--log-level", "info"]
        registry = settings.get("registry", "off")
        # With a registry servers hold what is published there, and that alone.
        command += ["--model", deployment["model"]] if registry == "off" else ["--registry", registry]
        self._process = subprocess.Popen(  # noqa: S603
            command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environ}
        )
        threading.Thread(target=self._follow, daemon=True).start()

    def state(self) -> dict[str, Any]:
        """deployment: as it was given. address: once it serves. failure: why it does not."""
        return {"deployment": self._deployment, "address": self._address, "failure": self._failure}

    def address(self) -> str | None:
        """HOST:PORT, once it serves."""
        return self._address

    def stop(self) -> None:
        """Let lookups under way end, and return when the server has ended."""
        self._stopping, self._address = True, None
        self._process.send_signal(signal.SIGTERM)
        self._process.wait()

    def _follow(self) -> None:
        """Hand the server's log on to Ray's, and end with the server."""
        last: deque[str] = deque(maxlen=1)
        assert self._process.stderr is not None
        for line in self._process.stderr:
            print(line, end="", file=sys.stderr, flush=True)  # noqa: T201
            last.append(line.strip())
            if self._address is None and '"serving"' in line:
                self._address = _address_in(line)
        if self._stopping:
            return
        if self._address is None:
            self._failure = last[0] if last else f"it ended with exit code {self._process.wait()}"
            time.sleep(_RETRY_S)
        os._exit(1)  # to Ray a crash


def _address_in(line: str) -> str | None:
    """The address in a line of the log that says that the server serves."""
    try:
        said = json.loads(line)
        return str(said["listen"]) if said["event"] == "serving" else None
    except (ValueError, LookupError, TypeError):
        return None


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Be a driver of the cluster, found as `ray.init` does. Raises DeploymentError."""
    try:
        ray.init(address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
    except (OSError, RuntimeError, ValueError) as error:
        raise DeploymentError(
            f"no Ray cluster at {address}; give --ray-address HOST:PORT, its head: {error}"
        ) from error
    try:
        yield
    except RayError as error:
        raise DeploymentError(f"Ray at {address}: {error}") from error
    finally:
        ray.shutdown()


def up(deployment: Deployment, timeout_s: float, say: Callable[[str], None]) -> None:
    """Have Ray run the servers that are missing, and wait until all serve; each is said once it does.

    Raises DeploymentError if servers of that name run with other arguments, if one ends before it serves, and if they
    do not all serve in time. What was started then stays, and Ray goes on with it.
    """
    deadline = time.monotonic() + timeout_s
    wanted = asdict(deployment)
    known = _servers(deployment.name)
    if known:
        # Whichever answers first speaks for all.
        _, state = next(_states(known, deadline), ("", None))
        if state is None:
            raise DeploymentError(_late(deployment, list(known), timeout_s))
        if state["deployment"] != wanted:
            raise DeploymentError(
                f"{deployment.name} runs with other arguments, {_differences(state['deployment'], wanted)}: "
                f"`engrampool down {deployment.name}` first, or give another --name"
            )
    servers = {
        f"{_group_name(deployment.name, shard)}/replica-{replica}": _start(deployment, shard, group, replica)
        for shard, group in {shard: _group(deployment, shard) for shard in deployment.resources}.items()
        for replica in range(deployment.replicas)
    }
    serving = set()
    for name, state in _states(servers, deadline):
        if state["failure"] is not None:
            raise DeploymentError(
                f"{name} does not start: {state['failure']}. Ray tries again, until `engrampool down {deployment.name}`"
            )
        if state["address"] is not None and name not in serving:
            serving.add(name)
            say(f"{name} {state['address']}")
        if len(serving) == len(servers):
            return
    raise DeploymentError(_late(deployment, sorted(set(servers) - serving), timeout_s))


def down(name: str, timeout_s: float) -> int:
    """Stop all servers of that name, letting lookups end for `timeout_s` at most. Returns how many there were.

    Raises DeploymentError if there are none.
    """
    servers = _servers(name)
    groups = [group for group in _groups() if group.startswith(f"{name}/")]
    if not servers and not groups:
        raise DeploymentError(f"no servers of the name {name} here")
    answers = {server.address.remote(): server for server in servers.values()}
    there, _ = ray.wait(list(answers), num_returns=len(answers), timeout=_ANSWER_S) if answers else ([], [])
    stops = [answers[answer].stop.remote() for answer in there]
    if stops:
        ray.wait(stops, num_returns=len(stops), timeout=timeout_s)
    for server in servers.values():
        ray.kill(server)
    for group in groups:
        remove_placement_group(get_placement_group(group))
    return len(servers)


def _servers(name: str) -> dict[str, Any]:
    """The actors of a deployment by name, in whatever state."""
    names = sorted(one for one in ray.util.list_named_actors() if one.startswith(f"{name}/"))
    return {one: ray.get_actor(one) for one in names}


def _groups() -> dict[str, str]:
    """The state of each placement group by name."""
    return {one["name"]: one["state"] for one in placement_group_table().values() if one["state"] != "REMOVED"}


def _group_name(name: str, shard: str) -> str:
    return f"{name}/shard-{shard.partition('/')[0]}"


def _group(deployment: Deployment, shard: str) -> PlacementGroup:
    name = _group_name(deployment.name, shard)
    try:
        return get_placement_group(name)
    except ValueError:  # there is none
        bundles = [dict(deployment.resources[shard])] * deployment.replicas
        return placement_group(bundles, strategy="STRICT_SPREAD", name=name, lifetime="detached")


def _start(deployment: Deployment, shard: str, group: PlacementGroup, replica: int) -> Any:
    return (
        ray.remote(ShardServer)
        .options(
            name=f"{_group_name(deployment.name, shard)}/replica-{replica}",
            get_if_exists=True,
            lifetime="detached",
            max_restarts=-1,
            num_cpus=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=replica),
        )
        .remote(asdict(deployment), shard)
    )


def _states(servers: Mapping[str, Any], deadline: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """What servers say of themselves, again and again until the deadline. Those that Ray restarts say nothing."""
    asked: dict[Any, str] = {}
    while time.monotonic() < deadline:
        asked.update({servers[name].state.remote(): name for name in set(servers) - set(asked.values())})
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_POLL_S)
        for answer in answered:
            name = asked.pop(answer)
            try:
                state = ray.get(answer)
            except ray.exceptions.ActorUnavailableError:
                continue
            yield name, state
        time.sleep(_POLL_S)


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {one.get(key)} instead of {other[key]}" for key in other if one.get(key) != other[key])


def _late(deployment: Deployment, missing: list[str], timeout_s: float) -> str:
    """The error for servers that do not serve in time."""
    groups = _groups()
    text = f"not serving after {timeout_s:g} s: {', '.join(missing)}. "
    unplaced = [shard for shard in deployment.resources if groups.get(_group_name(deployment.name, shard)) != "CREATED"]
    if unplaced:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        wanted = deployment.resources[unplaced[0]]
        text += (
            f"Ray has no place for shard {', '.join(unplaced)}: on {deployment.replicas} different nodes, "
            f"{_amounts(wanted)} that nobody uses on each; of that the nodes have, used or not, "
            f"{' | '.join(_amounts({name: node.get(name, 0) for name in wanted}) for node in nodes)}. "
        )
    return f"{text}Ray goes on trying, until `engrampool down {deployment.name}`"


def _amounts(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{name} {amount:.10g}" for name, amount in resources.items())
