"""Every example runs as a user runs it, learns, and can be read in one go."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest

FOLDER = Path(__file__).parents[2] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
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


@pytest.mark.slow
def test_the_notebook_runs_and_shows_what_it_says(monkeypatch):
    matplotlib.use("agg")
    monkeypatch.setattr(plt, "show", plt.close)
    notebook = json.loads((FOLDER / "first_steps.ipynb").read_text())
    names = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    shown = "".join(
        text for c in notebook["cells"] for o in c.get("outputs", ()) for text in o.get("text", ())
    )
    assert str(names["geometry"]) in shown
    accuracies = {name: accuracy for name, (*_, accuracy) in names["runs"].items()}
    assert accuracies["AGD"] > 0.95
    assert accuracies["spectral AGD"] > 0.95
    assert accuracies["Adam, 0.0001"] < accuracies["AGD"] > accuracies["Adam, 0.1"]
