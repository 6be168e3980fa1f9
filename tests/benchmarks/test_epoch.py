import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(script, *flags):
    command = [sys.executable, ROOT / "benchmarks" / script, *flags]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.mark.slow
def test_losses_times_and_shares_are_printed(prepared):
    pytest.importorskip("torch")
    data = prepared("cifar10", train=48, test=16)
    flags = "--arch fcn --batch_size 16 --checked 2 --steps 1 --turns 1 --workers 0"
    out = run("epoch.py", "--data_dir", data, *flags.split())
    differences = re.findall(r"^ +\d +[\d.]+ +[\d.]+ +(\S+)$", out, re.MULTILINE)
    assert len(differences) == 2
    assert max(map(float, differences)) < 1e-4
    assert re.search(r"epoch +[\d.]+ s +[\d.]+ s +\d+\.\d+ \(", out)
    assert re.search(r"step +[\d.]+ s +[\d.]+ s +\d+\.\d+ \(", out)
    assert re.search(r"ours: \d+% of that rate", out)


@pytest.mark.slow
def test_memory_is_asked_for_in_processes_of_their_own(prepared):
    pytest.importorskip("torch")
    data = prepared("cifar10", train=48, test=16)
    flags = "--arch fcn --batch_size 16"
    out = run("memory.py", "--data_dir", data, *flags.split())
    ours, peer, ratio = map(float, re.search(r"ours (\d+) MB, peer (\d+) MB: (\S+)", out).groups())
    assert ratio == pytest.approx(ours / peer, abs=0.01)
    # Neither imports its framework in less.
    assert min(ours, peer) > 100
