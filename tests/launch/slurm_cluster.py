"""A SLURM cluster of two nodes on this machine, with its own daemons, key, ports and state; removed at the end."""

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from mplug2_jax.launch.local import find_free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "squeue")
PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"
NODES = ("127.0.0.1", "127.0.0.2")  # addresses instead of names, which nothing resolves

CONFIG = """
ClusterName=drill
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1
ReturnToService=2
KillWait=10
FirstJobId={first}
NodeName=127.0.0.[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{slurmd0},{slurmd1}] CPUs={cpus} RealMemory=100
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def missing_programs() -> list[str]:
    """Return the programs that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]


class SlurmCluster:
    """The commands of the cluster."""

    def __init__(self, folder: Path) -> None:
        self.environment = os.environ | {"PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        self.environment.pop("JAX_COMPILATION_CACHE_DIR", None)

    def run(self, *words: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
        done = subprocess.run(
            [str(word) for word in words], env=self.environment | dict(env or {}), cwd=cwd, capture_output=True,
            text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """Return the properties of a job."""
        words = self.run("scontrol", "show", "job", number, "--oneliner").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, number: str, done: Callable[[dict[str, str]], bool], seconds: float) -> dict[str, str]:
        deadline = time.monotonic() + seconds
        while not done(job := self.job(number)):
            assert time.monotonic() < deadline, job
            time.sleep(0.2)
        return job


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[SlurmCluster]:
    """Start the daemons, and stop them at the end."""
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o600)
    first = find_free_port()
    while True:  # two consecutive ports, as SLURM needs them
        low = find_free_port()
        with socket.socket() as probe:
            if low < 65000 and probe.connect_ex(("127.0.0.1", low + 1)):
                break
    text = CONFIG.format(
        port=first, user=getpass.getuser(), folder=folder, first=1 + os.getpid() % 50_000, host=socket.gethostname(),
        slurmd0=low, slurmd1=low + 1, cpus=os.cpu_count(),
    ).replace(f"[{low},{low + 1}]", f"[{low}-{low + 1}]")  # fmt: skip
    (folder / "slurm.conf").write_text(text)
    cluster = SlurmCluster(folder)
    munge = [f"--{name}={folder / file}" for name, file in (
        ("key-file", "munge.key"), ("socket", "munge.sock"), ("pid-file", "munged.pid"), ("log-file", "munged.log"),
        ("seed-file", "munged.seed"),
    )]  # fmt: skip
    daemons: list[subprocess.Popen[bytes]] = []

    def start(*words: str) -> None:
        log = (folder / f"{words[0]}-{len(daemons)}.out").open("wb")
        program = shutil.which(words[0], path=PATH)
        assert program
        daemons.append(subprocess.Popen(
            [program, *words[1:]], env=cluster.environment, stdout=log, stderr=log, process_group=0
        ))  # fmt: skip

    try:
        start("munged", "--foreground", "--force", *munge)
        while not (folder / "munge.sock").exists():
            assert daemons[0].poll() is None, (folder / "munged-0.out").read_text()
            time.sleep(0.05)
        start("slurmctld", "-D")
        for node in NODES:
            (folder / f"spool-{node}").mkdir()
            start("slurmd", "-D", "-N", node)
        deadline = time.monotonic() + 60
        while _count_idle_nodes(cluster) < len(NODES):
            logs = "".join(path.read_text() for path in folder.glob("slurm*.out"))
            assert time.monotonic() < deadline, logs
            time.sleep(0.2)
        yield cluster
        subprocess.run(["scancel", "--full", "--me"], env=cluster.environment, capture_output=True, timeout=60)
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _count_idle_nodes(cluster: SlurmCluster) -> int:
    done = subprocess.run(
        ["scontrol", "show", "nodes", "--oneliner"], env=cluster.environment, capture_output=True, text=True, timeout=60
    )
    return done.stdout.count("State=IDLE ")
