"""Everything in the README that a reader may paste, pasted."""

import os
import re
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

README = (ROOT / "README.md").read_text()
SMALL = "--arch fcn --width 16 --depth 2 --train_bs 4 --test_bs 4 --image_size 16 --epochs 1"


def blocks(language):
    """What the README has in this language, without the indentation of lists."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", README, re.MULTILINE | re.DOTALL)
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


@pytest.mark.slow
def test_every_command_does_what_it_says(clone, tmp_path):
    """In the order of the README, some of them smaller: what is added is said here."""
    commands = iter(blocks("sh"))
    install = "git clone <this repository> agd-jax && cd agd-jax\n"
    assert "devices   1 x " in pasted(clone, next(commands).removeprefix(install))
    assert next(commands) == "./run test\n"  # This is one of them.
    assert "resumed   after step 220, with 20 epochs done" in pasted(clone, next(commands))
    out = pasted(clone, next(commands))
    assert re.search(r"^last +440 +40 ", out, re.MULTILINE)
    assert "digits.safetensors: 10 tensors of the best checkpoint" in out

    tree = write_tree(tmp_path / "tree", train=12, test=6)
    command = next(commands).rstrip().replace("DIR", shlex.quote(os.fspath(tree)))
    assert "image_folder of 3 classes, 12 training and 6 test" in pasted(
        clone, f"{command} {SMALL}"
    )
    command = next(commands).rstrip().replace("DIR", shlex.quote(os.fspath(tree)))
    assert "resnet50" in command
    assert "imagenet, 12 training and 6 test" in pasted(clone, f"{command} {SMALL}")

    write_tars(tmp_path, {"n01440764": ["n01440764_1.JPEG"]}, ["ILSVRC2012_val_00000001.JPEG"])
    command = next(commands).replace("TARS", shlex.quote(os.fspath(tmp_path)))
    out = pasted(clone, command.replace("DIR", shlex.quote(os.fspath(tmp_path / "tfds"))))
    assert f"imagenet is prepared in {tmp_path / 'tfds'}" in out

    first = next(commands).replace("10.0.0.1:1234", free_address())
    first = first.replace(" # and 1\n", " --epochs 1 --workdir runs/two")
    second = first.replace("--process_id 0", "--process_id 1")
    assert "of 2 processes" in pasted(clone, f"{second} > other.log 2>&1 & {first}; wait")
    assert next(commands, None) is None


@pytest.mark.slow
def scanned():
    """A network that scans over three layers, with its parameters and its input."""

    def apply(params, x):
        def layer(x, p):
            y = x * p["norm"]["scale"]
            query = jnp.einsum("td,dhk->thk", y, p["query"]["kernel"]) + p["query"]["bias"]
            return x + jnp.tanh(query.reshape(x.shape) @ p["up"]) @ p["down"], None

        return jax.lax.scan(layer, x, params["layers"])[0]

    query = {"kernel": jnp.ones((3, 8, 2, 4)), "bias": jnp.ones((3, 2, 4))}
    dense = {"up": jnp.ones((3, 8, 16)), "down": jnp.ones((3, 16, 8))}
    params = {"layers": {"norm": {"scale": jnp.ones((3, 8))}, "query": query} | dense}
    return apply, params, jnp.ones((5, 8))


@pytest.mark.slow
def test_every_piece_of_python_does_what_it_says(clone, monkeypatch):
    step, averaged, use, geometry, partition = blocks("python")
    names = {}
    exec(step, names)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(32, 784)), rng.normal(size=(32, 10))
    dense, opt_state = names["step"](names["params"], names["opt_state"], x, y)
    assert opt_state.eta > 0
    averages = names | {"params": dense}
    exec(averaged, averages)
    jax.tree.map(np.testing.assert_array_equal, averages["evaluated"], dense)
    apply, params, x = scanned()
    exec(geometry, names | {"apply": apply, "params": params, "example_inputs": [x]})
    assert str(agd_jax.geometry_of(apply, params, x)) in README
    exec(partition, names)
    attention = nn.MultiHeadDotProductAttention(num_heads=2).init(
        jax.random.key(0), np.ones((1, 3, 4))
    )
    with warnings.catch_warnings(action="error"):
        names["tx"].init({"dense": dense, "attention": attention["params"]})

    if not (clone / "runs" / "digits").exists():
        pasted(clone, "./run train --workdir runs/digits --epochs 20")
    digits = resident.load(SPECS["digits"]).test
    (seven, *_) = digits.images[digits.labels == 7]
    Image.fromarray(seven[..., 0]).resize((80, 80), Image.Resampling.NEAREST).save(
        clone / "seven.png"
    )
    (clone / "use.py").write_text(use)
    assert pasted(clone, ".venv/bin/python use.py") == "7\n"


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
        ("./run export nowhere w.safetensors", "error: nowhere: holds no checkpoint\n"),
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
