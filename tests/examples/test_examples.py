"""Every example runs as a user runs it, learns, and can be read in one go."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
MARKED = [pytest.param(p, marks=pytest.mark.slow) if p.stem != "nnx_model" else p for p in EXAMPLES]


@pytest.mark.parametrize("path", MARKED, ids=lambda path: path.stem)
def test_an_example_learns_in_under_sixty_lines(path):
    assert len(path.read_text().splitlines()) < 60
    # As for a user: steps are many.
    env = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    run = subprocess.run(
        [sys.executable, path], capture_output=True, text=True, check=True, env=env
    )
    last = run.stdout.splitlines()[-1]
    accuracy = float(re.search(r"test ([\d.]+)%$", last)[1])
    assert accuracy >= 95
    assert float(re.search(r"loss ([\d.]+)", last)[1]) < 0.3
