"""Everything in the README and the pages of docs/ that a reader may paste, pasted."""

import inspect
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import agd_jax
from input_pipeline import resident
from input_pipeline.specs import SPECS
from tests.helpers import ROOT, free_address
from tests.images import write_tars, write_tree

PAGES = sorted((ROOT / "docs").glob("*.md"))
SMALL = "--arch fcn --width 16 --depth 2 --train_bs 4 --test_bs 4 --image_size 16 --epochs 1"


def blocks(page, language):
    """What a page has in this language, without the indentation of lists."""
    text = (ROOT / page).read_text()
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", text, flags=re.MULTILINE) for indent, text in found]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the repository, whose environment is the one that runs the tests."""
    clone = tmp_path_factory.mktemp("clone")
    for name in (
        "agd_jax",
        "models",
        "input_pipeline",
        "training",
        "run",
        "train.py",
        "pyproject.toml",
        "requirements.lock",
    ):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, clone / name)
    (clone / ".venv").mkdir()
    for path in Path(sys.prefix).iterdir():
        if not path.name.startswith(".installed"):
            (clone / ".venv" / path.name).symlink_to(path)
    (clone / ".venv" / ".installed-train").touch()
    return clone


def paste(clone, command):
    # The environment is the one in the clone, whichever runs the tests.
    kept_out = ("TFDS_DATA_DIR", "VENV")
    env = {name: value for name, value in os.environ.items() if name not in kept_out}
    return subprocess.run(
        ["bash", "-ec", command], cwd=clone, env=env, capture_output=True, text=True
    )


def pasted(clone, command):
    run = paste(clone, command)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def commands_of(page):
    return iter(blocks(page, "sh"))


@pytest.mark.slow
def test_every_command_of_a_run_does_what_it_says(clone):
    readme, index, commands = map(commands_of, ("README.md", "docs/index.md", "docs/training.md"))
    install = "git clone <this repository> agd-jax && cd agd-jax\n"
    train = next(commands)
    assert train == next(readme) == f"{install}./run train\n"
    assert next(readme) == "./run test\n"  # This is one of them.
    assert list(index) == ["pip install .\n", "./run train\n"]  # The first is tests/test_wheel.py.
    assert "devices   1 x " in pasted(clone, train.removeprefix(install))
    assert "resumed   after step 220, with 20 epochs done" in pasted(clone, next(commands))
    out = pasted(clone, next(commands))
    assert re.search(r"^last +440 +40 ", out, re.MULTILINE)
    assert "digits.safetensors: 10 tensors of the best checkpoint" in out
    assert next(commands, None) is next(readme, None) is None

    (use,) = blocks("docs/training.md", "python")
    digits = resident.load(SPECS["digits"]).test
    (seven, *_) = digits.images[digits.labels == 7]
    Image.fromarray(seven[..., 0]).resize((80, 80), Image.Resampling.NEAREST).save(
        clone / "seven.png"
    )
    (clone / "use.py").write_text(use)
    assert pasted(clone, ".venv/bin/python use.py") == "7\n"


@pytest.mark.slow
def test_every_command_of_data_and_devices_does_what_it_says(clone, tmp_path):
    """Some of them smaller: what is added is said here."""
    commands = commands_of("docs/data.md")
    tree = write_tree(tmp_path / "tree", train=12, test=6)
    command = next(commands).rstrip().replace("DIR", shlex.quote(os.fspath(tree)))
    assert "image_folder of 3 classes, 12 training and 6 test" in pasted(
        clone, f"{command} {SMALL}"
    )
    write_tars(tmp_path, {"n01440764": ["n01440764_1.JPEG"]}, ["ILSVRC2012_val_00000001.JPEG"])
    command = next(commands).replace("TARS", shlex.quote(os.fspath(tmp_path)))
    out = pasted(clone, command.replace("DIR", shlex.quote(os.fspath(tmp_path / "tfds"))))
    assert f"imagenet is prepared in {tmp_path / 'tfds'}" in out
    command = next(commands).rstrip().replace("DIR", shlex.quote(os.fspath(tree)))
    assert "resnet50" in command
    assert "imagenet, 12 training and 6 test" in pasted(clone, f"{command} {SMALL}")
    assert next(commands, None) is None

    (first,) = commands_of("docs/devices.md")
    first = first.replace("10.0.0.1:1234", free_address())
    first = first.replace(" # and 1\n", " --epochs 1 --workdir runs/two")
    second = first.replace("--process_id 0", "--process_id 1")
    assert "of 2 processes" in pasted(clone, f"{second} > other.log 2>&1 & {first}; wait")


def run_python(page):
    """The names that the pieces of Python on a page leave, run one after the other."""
    names = {}
    with warnings.catch_warnings(action="error"):
        for block in blocks(page, "python"):
            exec(block, names)
    return names


# The first needs a trained network; the others have tests of their own.
ALONE = ("training.md", "any_model.md", "optax.md")


@pytest.mark.slow
@pytest.mark.parametrize("page", [page.name for page in PAGES if page.name not in ALONE])
def test_every_piece_of_python_on_a_page_runs(page):
    run_python(f"docs/{page}")


def test_the_table_of_a_geometry_is_what_is_printed(capsys):
    run_python("docs/any_model.md")
    (table,) = blocks("docs/any_model.md", "text")
    assert table in capsys.readouterr().out


def test_labels_are_for_dense_layers_and_attention():
    tx = run_python("docs/optax.md")["tx"]
    dense = {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}
    attention = nn.MultiHeadDotProductAttention(num_heads=2).init(
        jax.random.key(0), np.ones((1, 3, 4))
    )
    with warnings.catch_warnings(action="error"):
        tx.init({"dense": dense, "attention": attention["params"]})


def test_every_piece_of_python_of_the_readme_runs():
    step, geometry = blocks("README.md", "python")
    names = {}
    exec(step, names)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(32, 784)), rng.normal(size=(32, 10))
    params, opt_state = names["step"](names["params"], names["opt_state"], x, y)
    assert opt_state.eta > 0
    names |= {
        "apply": lambda p, x: jax.nn.relu(x @ p["in"]) @ p["out"],
        "params": params,
        "example_inputs": [x],
    }
    exec(geometry, names)
    assert names["geometry"].depth == 2
    opt_state = names["tx"].init(params)
    jax.tree.map(np.testing.assert_array_equal, agd_jax.averaged_params(opt_state, params), params)


@pytest.mark.parametrize(
    "page",
    [
        *("README.md", "CONTRIBUTING.md", "experiments/README.md"),
        *("benchmarks/README.md", "benchmarks/RESULTS.md", "benchmarks/scaling.md"),
    ],
)
def test_what_a_page_links_to_is_there(page):
    """Those of docs/ are followed when the site is built."""
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / page).read_text()):
        if not target.startswith("http"):
            assert (ROOT / page).parent.joinpath(target).exists(), target


def test_examples_and_formulas_of_docstrings_are_markdown_on_the_site():
    to_markdown = runpy.run_path(str(ROOT / "docs" / "roles.py"))["to_markdown"]
    text = to_markdown(inspect.getdoc(agd_jax.agd))
    assert "\n```pycon\n>>> import agd_jax" in text
    assert "\nTrue\n```\n" in text
    assert "\\begin{aligned}" in text
    assert ":math:" not in text


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("./run", "usage: ./run train "),
        ("./run evaluate", "usage: ./run train "),
        ("./run evaluate nowhere", "error: nowhere: holds no checkpoint\n"),
        (
            "./run export nowhere w.npz",
            "error: w.npz: is written as safetensors; give a name that ",
        ),
        pytest.param(
            *("./run export nowhere w.safetensors", "error: nowhere: holds no checkpoint\n"),
            marks=pytest.mark.slow,
        ),
        ("./run prepare mnist --tars x", "error: --tars x: is for imagenet, not for mnist\n"),
        ("./run prepare cifar1000", "error: cifar1000: unknown; choose from mnist, "),
    ],
)
def test_what_cannot_be_done_is_said(clone, command, message):
    run = paste(clone, command)
    assert run.returncode == 2
    assert run.stderr.startswith(message)


@pytest.mark.slow
def test_results_that_nobody_reads_are_no_error(clone, tmp_path):
    pasted(clone, f"./run train --epochs 1 --workdir {tmp_path}/run")
    for command in (f"evaluate {tmp_path}/run", f"export {tmp_path}/run {tmp_path}/w.safetensors"):
        run = paste(clone, f"set -o pipefail; ./run {command} | true")
        assert (run.returncode, run.stderr) == (0, "")


def test_run_explains_its_commands(clone):
    for command in ("train", "export", "prepare"):
        out = pasted(clone, f"./run {command} --help")
        assert "None" not in out
        assert out.startswith(
            "usage: train.py " if command == "train" else f"usage: ./run {command} "
        )
