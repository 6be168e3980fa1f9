"""The launchers, as far as one machine can try them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.images import write_tree

LAUNCH = Path(__file__).parents[2] / "launch"
SMALL = "--arch fcn --platform cpu --epochs 1 --depth 2 --width 16 --train_bs 16 --test_bs 40"

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
@pytest.mark.skipif(not shutil.which("mpirun"), reason="needs Open MPI (Debian: openmpi-bin)")
def test_open_mpi(tmp_path):
    flags = "--allow-run-as-root" if os.geteuid() == 0 else ""
    env = {"MPI_FLAGS": flags, "PYTHON": sys.executable}
    assert launch("openmpi.sh", env, tmp_path / "run") == 89


@pytest.mark.parametrize("script", ["slurm.sh", "openmpi.sh", "tpu_pod.sh"])
def test_scripts_are_sound(script):
    subprocess.run(["sh", "-n", LAUNCH / script], check=True)
    assert os.access(LAUNCH / script, os.X_OK)


def test_the_job_of_kubernetes_is_sound():
    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    assert service["metadata"]["name"] == job["spec"]["template"]["spec"]["subdomain"]
    assert job["spec"]["completions"] == job["spec"]["parallelism"]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["env"][0]["value"] == str(job["spec"]["completions"])
