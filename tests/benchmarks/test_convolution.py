import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def measure(flags):
    command = [sys.executable, ROOT / "benchmarks" / "convolution.py", *flags.split()]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


@pytest.mark.slow
def test_the_benchmark_times_every_form_that_fits():
    lines = measure("--batch_sizes 2 --turns 1 --layers 2 --wall")
    # The first convolution of an image is left to XLA, those after it are not.
    chosen = [re.findall(r"[\d.]+[* ]", line[38:]) for line in lines[3:]]
    assert [[time[-1] for time in row] for row in chosen] == [["*", " ", " "]] * 3 + [
        [" ", " ", "*"]
    ] * 3


@pytest.mark.slow
def test_a_step_without_winograd_is_another_program():
    _, line = measure("--steps vgg11 --batch_sizes 2 --turns 1")
    network, _, _, without, _, with_tiles, ratio = line.split()
    assert network == "vgg11"
    assert without != with_tiles
    assert float(ratio) > 0
