"""The command line, as a user has it."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def train(*flags, **kwargs):
    command = [sys.executable, ROOT / "train.py", *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, **kwargs)


def test_help_has_every_flag_in_a_line_and_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['train.py', '--help']\n"
        "import train\n"
        "try: train.main()\n"
        "except SystemExit: print(*sys.modules, file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    flags = (
        "arch dataset loss train_bs test_bs epochs depth width gain seed data_dir workdir "
        "platform precision save_every keep restart eval_only"
    )
    for flag in flags.split():
        assert re.search(rf"--{flag},? \S", run.stdout), flag
    heavy = {"jax", "flax", "optax", "numpy", "matplotlib", "tensorflow_datasets", "sklearn"}
    assert not heavy & set(run.stderr.split())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--arch", "resnext"], "error: --arch resnext: unknown; choose from "),
        (["--dataset", "svhn"], "error: --dataset svhn: unknown; choose from digits, "),
        (["--train_bs", "5000"], "error: --train_bs 5000: larger than the training set of digits"),
        (
            ["--workdir", "/dev/null/run"],
            "error: --workdir /dev/null/run: cannot write in /dev/null",
        ),
        (["--width", "0"], "error: --width 0: must be at least 1"),
        (["--epochs", "-1"], "error: --epochs -1: must be at least 1"),
        (["--platform", "tpu"], "error: --platform tpu: JAX finds no such device"),
    ],
)
def test_wrong_flags_are_answered_in_one_line(tmp_path, flags, message):
    run = train(*flags, cwd=tmp_path)
    assert run.returncode == 2
    assert run.stderr.startswith(message)
    assert run.stderr.count("\n") == 1
    assert run.stdout == ""
    assert not list(tmp_path.iterdir())


def test_data_that_is_nowhere_to_be_had_is_one_line_too(tmp_path):
    # No network, to this program: a proxy that nobody answers at.
    env = os.environ | {"HTTPS_PROXY": "http://127.0.0.1:9", "NO_PROXY": ""}
    run = train("--dataset", "cifar100", "--data_dir", tmp_path / "none", env=env, timeout=30)
    assert run.returncode == 2
    assert run.stderr.startswith(f"error: --dataset cifar100: not prepared in {tmp_path}")
    assert "run `python -m input_pipeline.prepare cifar100 --data_dir DIR`" in run.stderr
    assert run.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_is_one_line_too(tmp_path):
    run = train("--gain", "1e30", "--workdir", tmp_path / "run")
    assert run.returncode == 1
    assert re.fullmatch(
        r"stopped: the loss was (nan|inf) at step \d+ \(epoch 1\), after an eta of [\d.]+; "
        r"there is no checkpoint before it\n",
        run.stderr,
    )


def test_on_a_terminal_there_is_a_bar(tmp_path):
    flags = ["--epochs", "4", "--train_bs", "1", "--depth", "4", "--workdir", tmp_path / "run"]
    command = [sys.executable, ROOT / "train.py", *map(str, flags)]
    ours, theirs = pty.openpty()
    env = os.environ | {"TERM": "xterm-256color", "COLUMNS": "120"}
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    output = b""
    while True:
        try:
            output += os.read(ours, 65536)
        except OSError:  # The other end is closed.
            break
    assert process.wait() == 0
    bar = re.compile(
        rb"epoch [1-4]/4 .*loss \d\.\d{4}  acc [\d.]+%  eta \d\.\d{4}  [\d,]+ images/s"
    )
    assert bar.search(output)
    assert b"Result" in output
