"""launch/slurm.sh under SLURM itself: two nodes on this machine, as a user who may start them."""

import getpass
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.helpers import ROOT, free_address, read_records, wait_for_epochs
from tests.images import write_tree

PATH = f"{os.environ['PATH']}{os.pathsep}/usr/sbin"
DAEMONS = ("munged", "slurmctld", "slurmd")

# Nodes are called by addresses, at which JAX finds process 0. `urgent` preempts `main`, after a
# signal ahead if there is a grace time. Requeued jobs wait for as long as a credential holds.
CONF = """
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmUser={user}
SlurmdUser={user}
SlurmdSpoolDir={folder}/%n
SlurmdPidFile={folder}/%n.pid
StateSaveLocation={folder}/state
AuthInfo=socket={folder}/munge.socket,cred_expire=5
FirstJobId={first_job}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=127.0.0.1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=127.0.0.2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime={grace}
PartitionName=urgent Nodes=ALL PriorityTier=2
"""


class Cluster:
    """SLURM in a folder."""

    def __init__(self, folder):
        """Is not started yet."""
        self.folder, self.conf, self.daemons = folder, folder / "slurm.conf", []
        own = {"SLURM_CONF": str(self.conf), "PATH": PATH, "PYTHON": sys.executable}
        self.env = os.environ | own

    def start(self, grace):
        """Starts it, with so many seconds from the signal to the end of a job that is preempted."""
        folder = self.folder
        (folder / "state").mkdir(parents=True)
        ports = [free_address().rpartition(":")[2] for _ in range(3)]
        facts = {"folder": folder, "ports": ports, "user": getpass.getuser(), "grace": grace}
        self.conf.write_text(CONF.format(first_job=os.getpid(), **facts))
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = {
            "key-file": key,
            "socket": folder / "munge.socket",
            "pid-file": folder / "munge.pid",
        }
        files |= {"log-file": folder / "munge.log", "seed-file": folder / "munge.seed"}
        self.daemon("munged", "--foreground", "--force", *(f"--{k}={v}" for k, v in files.items()))
        self.wait_until(lambda: (folder / "munge.socket").exists())
        self.daemon("slurmctld", "-D", "-c")
        for node in ("127.0.0.1", "127.0.0.2"):
            self.daemon("slurmd", "-D", "-N", node)
        self.wait_until(lambda: self("sinfo", "-h", "-t", "idle", "-o", "%D", check=False) == "2")

    def daemon(self, *command):
        with (self.folder / f"{command[0]}-{len(self.daemons)}.log").open("w") as log:
            self.daemons.append(subprocess.Popen(command, env=self.env, stdout=log, stderr=log))

    def __call__(self, *command, check=True):
        """Runs a command of SLURM, and returns what it prints."""
        pipes = {"stdout": subprocess.PIPE, "text": True}
        return subprocess.run(command, check=check, env=self.env, **pipes).stdout.strip()

    def submit(self, *command):
        """Returns the number of a new job."""
        output = self.folder / "job-%j.log"
        return self("sbatch", "--parsable", f"--output={output}", *map(str, command))

    def output(self, job):
        """What the job has written."""
        return (self.folder / f"job-{job}.log").read_text()

    def job(self, job):
        """What SLURM knows of a job."""
        return dict(re.findall(r"(\w+)=(\S*)", self("scontrol", "show", "job", job)))

    def wait_until(self, condition):
        deadline = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.2)

    def wait_for_end(self, job):
        """Waits until the job has ended and is not to start again, and returns how it ended."""
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
        self.wait_until(lambda: self.job(job)["JobState"] in ends)
        return self.job(job)["JobState"]

    def logs(self):
        return "\n".join(f"{p}\n{p.read_text()}" for p in sorted(self.folder.glob("*.log")))

    def close(self):
        if len(self.daemons) == 4:
            self("scancel", "--user", getpass.getuser(), check=False)
            self.wait_until(lambda: not self("squeue", "-h", check=False))
        for daemon in reversed(self.daemons):
            daemon.terminate()
            daemon.wait(timeout=60)


@pytest.fixture
def slurm():
    missing = [name for name in DAEMONS if not shutil.which(name, path=PATH)]
    if missing:
        pytest.skip(f"needs {', '.join(missing)} (Debian: munge, slurmctld and slurmd)")
    # Not in tmp_path: SLURM's sockets are in there, whose names may have 107 bytes.
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        cluster = Cluster(Path(folder))
        yield cluster
        cluster.close()


@pytest.fixture
def train(tmp_path, monkeypatch):
    """The command that trains small, on other resources than the script asks for."""
    # In a folder like the repository, for the script's own workdir is in where it is submitted.
    folder = tmp_path / "agd-jax"
    folder.mkdir()
    for name in ("launch", "train.py"):
        (folder / name).symlink_to(ROOT / name)
    monkeypatch.chdir(folder)
    tree = write_tree(tmp_path / "imagenet", train=330, test=6)
    resources = ("--gpus-per-node=0", "--cpus-per-task=1", "launch/slurm.sh")
    flags = "--arch fcn --platform cpu --depth 2 --width 16 --train_bs 16 --test_bs 40"
    data = ("--data_dir", tree, "--image_size", 16, "--workers", 1, "--precision", "f32")
    return (*resources, *flags.split(), *data)


@pytest.mark.slow
@pytest.mark.usefixtures("one_at_a_time")
@pytest.mark.parametrize("grace", [0, 30], ids=["requeued by SLURM", "requeued by the script"])
def test_a_job_that_is_preempted_goes_on_by_itself(slurm, train, grace):
    slurm.start(grace)
    job = slurm.submit(*train, "--epochs", 60)
    workdir = Path("runs") / f"slurm-{job}"
    wait_for_epochs(workdir)
    urgent = slurm.submit("--partition=urgent", "--nodes=2", "--exclusive", "--wrap=true")
    assert slurm.wait_for_end(urgent) == "COMPLETED"
    end, output = slurm.wait_for_end(job), slurm.output(job)
    assert end == "COMPLETED", output
    assert slurm.job(job)["Restarts"] == "1"
    assert "devices   2 x cpu (cpu) of 2 processes" in output
    assert len(re.findall("^stopped: SIGTERM after step", output, re.M)) == 2
    assert len(re.findall("^resumed   after step", output, re.M)) == 1
    assert [record["epoch"] for record in read_records(workdir)] == list(range(1, 61))


@pytest.mark.slow
@pytest.mark.usefixtures("one_at_a_time")
def test_a_job_that_fails_or_is_cancelled_does_not_go_on(slurm, train):
    slurm.start(0)
    failing = slurm.submit(*train, "--epochs", -1)
    assert slurm.wait_for_end(failing) == "FAILED"
    assert slurm.job(failing)["ExitCode"] == "2:0"
    cancelled = slurm.submit(*train, "--epochs", 100_000)
    wait_for_epochs(Path("runs") / f"slurm-{cancelled}")
    slurm("scancel", cancelled)
    slurm.wait_until(lambda: not slurm("squeue", "-h"))
    assert slurm.job(cancelled)["JobState"] == "CANCELLED"
    assert "stopped: SIGTERM after step" in slurm.output(cancelled)
    assert {slurm.job(job)["Restarts"] for job in (failing, cancelled)} == {"0"}
