import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.images import write_tree

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path):
    tree = write_tree(tmp_path, train=12, test=3)
    flags = "--batch_size 4 --images 8 --turns 1 --no-steps"
    command = [sys.executable, ROOT / "benchmarks" / "input_pipeline.py", "--data_dir", tree]
    run = subprocess.run([*command, *flags.split()], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "12 images of" in run.stdout
    assert "an example, all of it" in run.stdout
    assert re.search(r"decode +\d+ +ours is \d+\.\d+ times that", run.stdout)
