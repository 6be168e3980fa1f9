"""What is published: the library alone, installed where nothing else is."""

import re
import subprocess
import sys
import zipfile

import pytest

import agd_jax
from tests.helpers import ROOT
from tests.test_docs import blocks

TRAINS = """
x, y = jax.random.normal(jax.random.key(1), (2, 32, 784))
before = params
for _ in range(3):
    params, opt_state = step(params, opt_state, x, y[:, :10])
assert opt_state.eta > 0
assert all(map(lambda a, b: (a != b).all(), jax.tree.leaves(before), jax.tree.leaves(params)))
"""


def run(*command, **kwargs):
    done = subprocess.run(command, capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_version_is_everywhere_the_same():
    version = re.escape(agd_jax.__version__)
    assert re.search(rf"^version: {version}$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    sections = re.findall(r"^## ([\d.]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert sections[0] == agd_jax.__version__


@pytest.mark.slow
def test_the_wheel_has_the_library_alone_and_trains(tmp_path):
    dist, venv = tmp_path / "dist", tmp_path / "venv"
    run(sys.executable, "-m", "build", "--outdir", dist, ROOT)
    files = sorted(dist.iterdir())
    version = agd_jax.__version__
    assert [file.name for file in files] == [
        f"agd_jax-{version}-py3-none-any.whl",
        f"agd_jax-{version}.tar.gz",
    ]
    run(sys.executable, "-m", "twine", "check", "--strict", *files)
    names = zipfile.ZipFile(files[0]).namelist()
    assert {name.split("/")[0] for name in names} == {"agd_jax", f"agd_jax-{version}.dist-info"}
    assert "agd_jax/py.typed" in names

    run(sys.executable, "-m", "venv", venv)
    lock = ROOT / "requirements.lock"
    run(venv / "bin" / "pip", "install", "--quiet", "--constraint", lock, files[0])
    installed = run(venv / "bin" / "pip", "list", "--format", "freeze")
    assert "flax" not in installed
    code = blocks("README.md", "python")[0] + TRAINS
    run(venv / "bin" / "python", "-W", "error", "-c", code, cwd=tmp_path)
