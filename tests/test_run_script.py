"""The script ``./run``, with a virtual environment that writes down what it is asked for."""

import os
import subprocess

import pytest

from tests.helpers import ROOT

PROGRAM = '#!/bin/sh\necho "$(basename "$0")" "$@" >> {log}\n'


@pytest.fixture
def run(tmp_path):
    """Runs ``./run`` with these words; returns its exit code and what it has called."""
    log, programs = tmp_path / "log", tmp_path / "venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("pip", "python"):
        (programs / name).write_text(PROGRAM.format(log=log))
        (programs / name).chmod(0o755)

    def run(*words):
        log.write_text("")
        env = os.environ | {"VENV": os.fspath(tmp_path / "venv")}
        code = subprocess.run([ROOT / "run", *words], env=env, capture_output=True).returncode
        return code, log.read_text().splitlines()

    return run


def test_the_jax_of_a_device_stays_whatever_is_installed_later(run):
    code, (installed,) = run("install", "cuda13")
    assert code == 0
    assert installed.endswith(f"--constraint {ROOT}/requirements.lock --editable {ROOT}[cuda13]")
    assert run("install", "cuda13") == (0, [])
    code, (installed, trained) = run("train", "--epochs", "3")
    assert code == 0
    assert installed.endswith(f"--editable {ROOT}[train,cuda13]")
    assert trained == f"python {ROOT}/train.py --epochs 3"
    assert run("train") == (0, [f"python {ROOT}/train.py"])


@pytest.mark.parametrize("words", [[], ["install"], ["install", "rocm"], ["tarin"], ["evaluate"]])
def test_what_it_does_not_know_is_answered_with_what_it_does(run, words):
    assert run(*words) == (2, [])
