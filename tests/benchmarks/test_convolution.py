import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_benchmark_times_every_form_that_fits():
    flags = "--batch_sizes 2 --turns 1 --layers 2 --wall"
    command = [sys.executable, ROOT / "benchmarks" / "convolution.py", *flags.split()]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    # The first convolution of an image is left to XLA, those after it are not.
    chosen = [re.findall(r"[\d.]+[* ]", line[38:]) for line in run.stdout.splitlines()[3:]]
    assert [[time[-1] for time in row] for row in chosen] == [["*", " ", " "]] * 3 + [
        [" ", " ", "*"]
    ] * 3
