"""A real Slurm of several nodes on this machine, as root, for the integration tests.

python tests/launchers/slurm_cluster.py start|stop DIR [--nodes 2]
"""

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

_PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "squeue")
_CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CryptoType=crypto/munge
SlurmctldPort={port}
SlurmdPort={port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/pid/slurmctld.pid
SlurmdPidFile={folder}/pid/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=5,batch_sched_delay=0
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=10
KillWait=5
MinJobAge=600
InactiveLimit=0
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
RebootProgram=/bin/true
SlurmdParameters=config_overrides
"""


def missing() -> str | None:
    """Why Slurm cannot be started here, None when it can."""
    absent = [name for name in _PROGRAMS if shutil.which(name) is None and not Path("/usr/sbin", name).exists()]
    if absent:
        return f"no {', '.join(absent)} on this machine (Debian: apt-get install slurm-wlm munge)"
    return None if os.geteuid() == 0 else "Slurm of several nodes on one machine needs root"


class Cluster:
    """Nodes n1 to n<count> with the cores of this machine each, and the partitions ``main`` and ``high``."""

    def __init__(self, folder: Path, nodes: int = 2) -> None:
        self.folder, self.nodes = folder, nodes
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self.environment["PATH"] += ":/usr/sbin"

    def start(self) -> None:
        """Start munge, the controller and the nodes, and wait until all are idle."""
        folder, cores = self.folder, 16
        for name in ("state", "spool", "log", "pid"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1] // 100 * 100 % 20000 + 20000
        host = socket.gethostname().partition(".")[0]
        lines = [_CONF.format(host=host, folder=folder, port=port)]
        for number in range(1, self.nodes + 1):
            where = f"NodeHostname={host} NodeAddr=127.0.0.1 Port={port + number}"
            lines.append(f"NodeName=n{number} {where} CPUs={cores} State=UNKNOWN")
        rest = f"Nodes=n[1-{self.nodes}] MaxTime=INFINITE State=UP"
        lines.append(f"PartitionName=main {rest} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=15")
        lines.append(f"PartitionName=high {rest} PriorityTier=10 PreemptMode=OFF")
        (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        munge = (
            ("socket", "munge.sock"),
            ("key-file", "munge.key"),
            ("pid-file", "pid/munged.pid"),
            ("seed-file", "seed"),
        )
        self.run("munged", "--force", f"--log-file={folder}/log/munged.log", *(f"--{a}={folder}/{b}" for a, b in munge))
        self.run("slurmctld", "-c")
        for number in range(1, self.nodes + 1):
            self.start_node(number)
        deadline = time.monotonic() + 30
        while self.run("sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D", check=False).strip() != str(self.nodes):
            if time.monotonic() > deadline:
                raise RuntimeError(f"Slurm does not start, see {folder}/log")
            time.sleep(0.1)

    def start_node(self, number: int) -> None:
        """Start a node's slurmd."""
        self.run("slurmd", "-N", f"n{number}")

    def kill_node(self, number: int) -> None:
        """kill -9 a node's slurmd and everything that it has started."""
        pid = int((self.folder / f"pid/slurmd-n{number}.pid").read_text())
        for process in [pid, *_offspring(f"n{number}")]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def run(self, *words: str, check: bool = True) -> str:
        """Run one of Slurm's commands."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, check=False, timeout=60)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
        return done.stdout

    def stop(self) -> None:
        """End what was started, and only that."""
        self.run("scancel", "--full", "--state=RUNNING", check=False)
        for path in sorted((self.folder / "pid").glob("*.pid")):
            with contextlib.suppress(ValueError, ProcessLookupError, FileNotFoundError):
                os.kill(int(path.read_text()), signal.SIGTERM)
        time.sleep(1)
        for number in range(1, self.nodes + 1):
            for process in _offspring(f"n{number}"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)


def _offspring(node: str) -> list[int]:
    """Processes of the jobs of a node, found by their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            variables = (path / "environ").read_bytes().split(b"\0")
            if f"SLURMD_NODENAME={node}".encode() in variables and int(path.name) != os.getpid():
                found.append(int(path.name))
    steps = subprocess.run(["pgrep", "-f", f"slurmstepd.*{node}"], capture_output=True, text=True, check=False)
    return found + [int(line) for line in steps.stdout.split()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=("start", "stop"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nodes", type=int, default=2)
    args = parser.parse_args()
    cluster = Cluster(args.folder.resolve(), args.nodes)
    getattr(cluster, args.action)()
    if args.action == "start":
        print(f"export SLURM_CONF={args.folder.resolve()}/slurm.conf")
