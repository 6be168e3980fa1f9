"""The launchers, as far as one machine can try them."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from input_pipeline.command_line import parse
from tests.images import write_tree
from training.config import TrainConfig

LAUNCH = Path(__file__).parents[2] / "launch"
SMALL = "--arch fcn --platform cpu --epochs 1 --depth 2 --width 16 --train_bs 16 --test_bs 40"

needs_open_mpi = pytest.mark.skipif(
    not shutil.which("mpirun"), reason="needs Open MPI (Debian: openmpi-bin)"
)
MPI_FLAGS = "--allow-run-as-root" if os.geteuid() == 0 else ""

# Starts two tasks on this node, with what SLURM tells each of them.
SRUN = """#!{python}
import os, subprocess, sys
assert sys.argv[1:3] == ["--cpus-per-task=12", "--kill-on-bad-exit=0"]
command = sys.argv[3:]
step = {{"SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "1"}}
tasks = [
    subprocess.Popen(
        command, env=os.environ | step | {{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}}
    )
    for i in range(2)
]
sys.exit(max(task.wait() for task in tasks))
"""


def launch(script, env, workdir, *data):
    flags = "--xla_force_host_platform_device_count=4"
    command = ["sh", LAUNCH / script, *SMALL.split(), "--workdir", workdir, *data]
    run = subprocess.run(
        command, env=os.environ | {"XLA_FLAGS": flags} | env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "8 x cpu (cpu) of 2 processes" in run.stdout
    (line,) = (workdir / "metrics.jsonl").read_text().splitlines()
    return json.loads(line)["step"]


@pytest.mark.slow
def test_slurm_as_far_as_it_goes_without_slurm(tmp_path):
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text(SRUN.format(python=sys.executable))
    srun.chmod(0o755)
    path = f"{srun.parent}{os.pathsep}{os.environ['PATH']}"
    tree = write_tree(tmp_path / "imagenet", train=33, test=6)
    data = ["--data_dir", tree, "--image_size", "16", "--workers", "1", "--precision", "f32"]
    job = {"SLURM_JOB_ID": "71234", "SLURM_CPUS_PER_TASK": "12"}
    env = job | {"PATH": path, "PYTHON": sys.executable}
    assert launch("slurm.sh", env, tmp_path / "run", *data) == 2


@pytest.mark.slow
@needs_open_mpi
def test_open_mpi(tmp_path):
    env = {"MPI_FLAGS": MPI_FLAGS, "PYTHON": sys.executable}
    assert launch("openmpi.sh", env, tmp_path / "run") == 89


# Takes three seconds to end, as a run that saves does.
SAVE = """#!{python}
import signal, sys, time
from pathlib import Path

def save(signum, frame):
    time.sleep(3)
    Path("{folder}", sys.argv[1]).touch()
    sys.exit(143)

signal.signal(signal.SIGTERM, save)
Path("{folder}", "started").touch()
signal.pause()
"""


@pytest.mark.slow
@needs_open_mpi
def test_open_mpi_leaves_time_to_save(tmp_path):
    python = tmp_path / "python"
    python.write_text(SAVE.format(python=sys.executable, folder=tmp_path))
    python.chmod(0o755)
    env = os.environ | {"MPI_FLAGS": MPI_FLAGS, "PYTHON": str(python)}
    run = subprocess.Popen(["sh", LAUNCH / "openmpi.sh"], env=env)
    while not (tmp_path / "started").exists():
        assert run.poll() is None
        time.sleep(0.1)
    run.terminate()
    assert run.wait(timeout=90) != 0
    assert (tmp_path / "train.py").exists()


@pytest.mark.parametrize("script", ["slurm.sh", "openmpi.sh", "tpu_pod.sh"])
def test_scripts_are_sound(script):
    subprocess.run(["sh", "-n", LAUNCH / script], check=True)
    assert os.access(LAUNCH / script, os.X_OK)


# Prints its command line, one word a line.
GCLOUD = """#!/bin/sh
printf '%s\\n' "$@"
"""


def test_the_command_for_tpus_is_sound(tmp_path, monkeypatch):
    gcloud = tmp_path / "gcloud"
    gcloud.write_text(GCLOUD)
    gcloud.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    command = ["sh", LAUNCH / "tpu_pod.sh", "--epochs", "7"]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert "--worker=all" in run.stdout.splitlines()
    remote = run.stdout.splitlines()[-1].removeprefix("--command=")
    folder, start = remote.split(" && ")
    assert folder == "cd ~/agd-jax"
    assert start.startswith("exec .venv/bin/python train.py ")
    config = flags_of(start, monkeypatch)
    assert config.distribute
    assert config.epochs == 7
    assert config.workdir


def flags_of(command, monkeypatch):
    """The flags of train.py in a command of a shell."""
    words = shlex.split(command)
    monkeypatch.setattr("sys.argv", words[words.index("train.py") :])
    return parse(TrainConfig)


@pytest.fixture
def kubernetes():
    """The service and the job of Kubernetes."""
    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    return list(yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text()))


def test_the_job_of_kubernetes_is_sound(kubernetes, monkeypatch):
    service, job = kubernetes
    pod = job["spec"]["template"]["spec"]
    assert service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert job["spec"]["completions"] == job["spec"]["parallelism"]
    (container,) = pod["containers"]
    assert container["env"][0]["value"] == str(job["spec"]["completions"])
    (given,) = container["args"]
    given = given.replace("$PROCESSES", "2").replace("$JOB_COMPLETION_INDEX", "1")
    config = flags_of(given, monkeypatch).resolved()
    assert config.coordinator == f"{job['metadata']['name']}-0.{pod['subdomain']}:1234"

    assert {v["name"] for v in pod["volumes"]} == {v["name"] for v in container["volumeMounts"]}
    mounted = {volume["mountPath"]: volume["name"] for volume in container["volumeMounts"]}
    shared = next(v for v in pod["volumes"] if v["name"] == mounted["/dev/shm"])
    assert shared["emptyDir"]["medium"] == "Memory"
    for path in (config.data_dir, config.workdir):
        assert any(Path(str(path)).is_relative_to(folder) for folder in mounted)


@pytest.mark.parametrize("version", ["1.29", "1.37"])
def test_kubernetes_admits_the_job(kubernetes, version):
    validator = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate")
    for resource in kubernetes:
        validator.validate(resource, version, strict=True)
