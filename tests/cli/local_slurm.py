"""A SLURM of several nodes on this machine: its own key, ports and folders; all of it is ended by id."""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "srun")
_SYSTEM = ("/usr/sbin", "/usr/local/sbin")
_UP_S, _ENDS_S = 60.0, 15.0
# So long a node may be silent before it is taken for dead, and a job that was ended may take to leave.
SILENT_S, KILL_WAIT_S = 10, 20


def missing() -> str:
    """Why there can be no SLURM here; empty where there can."""
    lacking = [name for name in NEEDED if _found(name) is None]
    if lacking:
        return f"no {', '.join(lacking)} (Debian: slurmctld slurmd slurm-client munge)"
    return "" if os.geteuid() == 0 else "slurmd starts jobs as root only"


def _found(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(_SYSTEM))


class LocalSlurm:
    """Starts with the block and is gone after it.

    Args:
        place: An empty folder with a short path: sockets lie in it.
        num_nodes: How many nodes, n1 and so on.
        cpus: Of each.
    """

    def __init__(self, place: Path, num_nodes: int = 4, cpus: int = 2) -> None:
        self.place = place
        self.num_nodes = num_nodes
        self._cpus = cpus
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def environment(self) -> dict[str, str]:
        """What its commands have to know."""
        return {"SLURM_CONF": str(self.place / "slurm.conf")}

    def __enter__(self) -> LocalSlurm:
        try:
            self._write()
            socket_file = self.place / "munge.socket"
            self._start("munged", "--foreground", "--force", *self._munge(socket_file))
            self.wait(socket_file.exists, "munge")
            self._start("slurmctld", "-D", "-f", self.environment["SLURM_CONF"])
            for node in range(1, self.num_nodes + 1):
                self.start_node(f"n{node}")
            self.wait(lambda: self.nodes("idle") == self.num_nodes, "all nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(subprocess.SubprocessError):
            jobs = self.ask("squeue", "--noheader", "--format=%A").split()
            if jobs:
                self.ask("scancel", "--signal=KILL", "--full", *jobs)
                self.ask("scancel", *jobs)
                self.wait(lambda: not self.ask("squeue", "--noheader"), "the queue to be empty")
        for name in reversed(list(self._daemons)):
            self._stop(name)

    def start_node(self, name: str) -> None:
        """Start a node's daemon."""
        (self.place / f"spool.{name}").mkdir(exist_ok=True)
        self._start(f"slurmd.{name}", "-D", "-N", name, "-f", self.environment["SLURM_CONF"])

    def kill_node(self, name: str) -> None:
        """End a node's daemon as a crash does."""
        daemon = self._daemons.pop(f"slurmd.{name}")
        daemon.kill()
        daemon.wait()

    def ask(self, *words: str) -> str:
        """The output of one of its commands."""
        done = subprocess.run(
            words,
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        return done.stdout.strip()

    def nodes(self, state: str) -> int:
        """How many nodes are in a state."""
        with contextlib.suppress(subprocess.SubprocessError):
            return self.ask("sinfo", "--noheader", "--Node", "--format=%T").split().count(state)
        return 0

    def state(self, job: str) -> str:
        """Of a job: PENDING, RUNNING and so on."""
        found = self.ask("scontrol", "--oneliner", "show", "job", job)
        return found.partition("JobState=")[2].split()[0]

    def wait(self, holds: Callable[[], object], what: str, wait_s: float = _UP_S) -> None:
        """Until something holds, which SLURM tells nobody of."""
        deadline = time.monotonic() + wait_s
        while not holds():
            assert time.monotonic() < deadline, f"no {what} within {wait_s:g} s\n{self._logs()}"
            time.sleep(0.1)  # squeue and sinfo tell how it stands, and wait for nothing

    def _logs(self) -> str:
        return "\n".join(
            f"--- {file.name}\n{file.read_text(errors='replace')[-2000:]}"
            for file in self.place.glob("*.log")
        )

    def _start(self, name: str, *words: str) -> None:
        program = _found(name.partition(".")[0])
        assert program is not None
        with (self.place / f"{name}.out").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                [program, *words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **self.environment},
                start_new_session=True,
            )

    def _stop(self, name: str) -> None:
        daemon = self._daemons.pop(name)
        daemon.send_signal(signal.SIGTERM)
        try:
            daemon.wait(_ENDS_S)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def _munge(self, socket_file: Path) -> Sequence[str]:
        key = self.place / "munge.key"
        key.touch(mode=0o400)
        key.chmod(0o600)
        key.write_bytes(secrets.token_bytes(128))
        names = {"key-file": key, "socket": socket_file, "pid-file": "munged.pid", "log-file": "munged.log"}
        names["seed-file"] = "munge.seed"
        return [f"--{option}={self.place / file}" for option, file in names.items()]

    def _write(self) -> None:
        self.place.mkdir(parents=True, exist_ok=True)
        self.place.chmod(0o755)
        (self.place / "state").mkdir()
        (self.place / "cgroup.conf").write_text("CgroupAutomount=no\n")
        host, user = socket.gethostname().partition(".")[0], getpass.getuser()
        controller, *nodes = _free_ports(self.num_nodes + 1)
        lines = [
            "ClusterName=local",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmUser={user}",
            f"SlurmdUser={user}",
            "AuthType=auth/munge",
            f"AuthInfo=socket={self.place / 'munge.socket'},cred_expire=8",
            "CredType=cred/munge",
            f"SlurmctldPort={controller}",
            f"StateSaveLocation={self.place / 'state'}",
            f"SlurmdSpoolDir={self.place}/spool.%n",
            f"SlurmctldPidFile={self.place}/slurmctld.pid",
            f"SlurmdPidFile={self.place}/slurmd.%n.pid",
            f"SlurmctldLogFile={self.place}/slurmctld.log",
            f"SlurmdLogFile={self.place}/slurmd.%n.log",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "SwitchType=switch/none",
            "MpiDefault=none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_Core",
            "SchedulerType=sched/backfill",
            "SchedulerParameters=bf_interval=1,sched_interval=1",
            "AccountingStorageType=accounting_storage/none",
            "JobAcctGatherType=jobacct_gather/none",
            "JobRequeue=1",
            "ReturnToService=2",
            f"KillWait={KILL_WAIT_S}",
            "MessageTimeout=10",
            f"SlurmdTimeout={SILENT_S}",
            "PropagateResourceLimits=NONE",
            *(
                f"NodeName=n{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={self._cpus} "
                "RealMemory=2000 State=UNKNOWN"
                for number, port in enumerate(nodes, start=1)
            ),
            f"PartitionName=all Nodes=n[1-{self.num_nodes}] Default=YES MaxTime=1:00:00 State=UP",
        ]
        (self.place / "slurm.conf").write_text("\n".join(lines) + "\n")


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
