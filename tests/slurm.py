"""A small Slurm: its real daemons on a host of its own, with nodes that are names of that one machine."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from network import network
from prometheus_process import until
from server_fixtures import lacking

NODES = ("node0", "node1", "node2")
_CONFIG = """
ClusterName=test
SlurmctldHost=localhost
SlurmUser=root
SlurmdUser=root
# No munge, no cgroups and no accounts: whoever runs here is root.
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
# As tests are in a hurry.
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
NodeName=node[0-2] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[17000-17002] CPUs=2 RealMemory=4000
PartitionName=all Nodes=node[0-2] Default=YES
"""


@dataclass(frozen=True)
class Slurm:
    """Where its commands reach it. prefix: words before a command."""

    prefix: tuple[str, ...]
    environ: dict[str, str]

    def run(self, *words: str | Path, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
        command = [*self.prefix, *map(str, words)]
        return subprocess.run(command, env=self.environ, cwd=cwd, capture_output=True, text=True, timeout=300)

    def state(self, job: str) -> str:
        shown = self.run("scontrol", "show", "job", "--oneliner", job)
        assert shown.returncode == 0, shown.stderr
        return shown.stdout.partition("JobState=")[2].split()[0]


@contextmanager
def running_slurm(directory: Path, environ: dict[str, str]) -> Iterator[Slurm]:
    """Three nodes without a job. environ: of its daemons and commands. Raises network.NotPermittedError."""
    for program in ("slurmctld", "slurmd", "srun"):
        if shutil.which(program) is None:
            lacking(f"{program} is not installed (Debian: apt-get install slurmctld slurmd)")
    config = directory / "slurm.conf"
    config.write_text(_CONFIG.format(directory=directory))
    hosts = directory / "hosts"
    hosts.write_text(f"127.0.0.1 localhost {' '.join(NODES)}\n")
    with ExitStack() as stack:
        (host,) = stack.enter_context(network(1))
        named = ("unshare", "--mount", "sh", "-c", f'mount --bind {hosts} /etc/hosts && exec "$@"', "sh")
        slurm = Slurm((*host.prefix, *named), {**environ, "SLURM_CONF": str(config)})
        daemons = [["slurmctld", "-D"], *(["slurmd", "-D", "-N", node] for node in NODES)]
        log = stack.enter_context((directory / "log").open("w"))
        for words in daemons:
            process = subprocess.Popen([*slurm.prefix, *words], env=slurm.environ, stdout=log, stderr=log)
            stack.enter_context(process)
            stack.callback(process.terminate)
        until(lambda: slurm.run("sinfo", "-h", "-o", "%t %D").stdout == f"idle {len(NODES)}\n", "all nodes are idle")
        yield slurm
        slurm.run("scancel", "--user=root")
        until(lambda: slurm.run("squeue", "-h").stdout == "", "no job is left")
