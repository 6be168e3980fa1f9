import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, PartitionSpec

from training import sharding
from training.config import TrainConfig
from training.errors import ConfigError

MESHES = ("fsdp=8", "data=2,fsdp=2,model=2", "data=8", "data=4,model=2")
TOLERANCE = {"f32": 1e-5, "f64": 1e-10}
ROOT = Path(__file__).parents[2]
EIGHT = os.environ | {
    # Compiling takes most of the time.
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
    "JAX_PLATFORMS": "cpu",
}


def five_steps(*arguments):
    """What ``five_steps.py`` measures with these arguments, on one device and on each mesh."""
    command = [sys.executable, "-m", "tests.training.five_steps", *map(str, arguments)]
    run = subprocess.run(command, cwd=ROOT, env=EIGHT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("arch", "precision", "norm", "meshes"),
    [
        ("fcn", "f64", "frobenius", MESHES[:1]),
        pytest.param("fcn", "f64", "frobenius", MESHES, marks=pytest.mark.slow),
        pytest.param("fcn", "f64", "spectral", MESHES, marks=pytest.mark.slow),
        pytest.param("fcn", "f32", "frobenius", MESHES[:2], marks=pytest.mark.slow),
        pytest.param("resnet18", "f64", "frobenius", MESHES[1:2], marks=pytest.mark.slow),
        pytest.param("resnet18", "f64", "spectral", MESHES[:1], marks=pytest.mark.slow),
        pytest.param("vit", "f64", "frobenius", MESHES[1:2], marks=pytest.mark.slow),
    ],
)
def test_training_is_the_same_on_every_mesh(arch, precision, norm, meshes):
    one, *others = five_steps(arch, precision, norm, 0, "one", *meshes)
    assert one["split"] == 0
    tolerance = TOLERANCE[precision]
    for mesh, other in zip(meshes, others, strict=True):
        assert other["start_entries"] == pytest.approx(one["start_entries"], rel=1e-5), mesh
        for name in ("loss", "test_loss", "eta", "gradient_summary", "start", "params"):
            assert other[name] == pytest.approx(one[name], rel=tolerance), (mesh, name)
        stats = pytest.approx(one["batch_stats"], rel=10 * tolerance, abs=10 * tolerance)
        assert other["batch_stats"] == stats, mesh
        if "fsdp" in mesh or ("model" in mesh and arch == "fcn"):
            assert other["split"] > 0, mesh
        if mesh == "fsdp=8":
            assert other["bytes"] < 0.2 * one["bytes"]
        if mesh == "fsdp=8" and norm == "spectral":
            # Momentum and average are split as their parameter is.
            assert other["opt_bytes"] < 0.2 * one["opt_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize("bn_group", [6, 8, 24], ids=["within", "across", "of several"])
def test_groups_of_batch_norm_are_the_same_on_every_mesh(bn_group):
    """Groups within the twelve examples of a device, some across two, and of two devices each."""
    one, other = five_steps("resnet18", "f64", "frobenius", bn_group, "one", "data=4,fsdp=2")
    for name in ("loss", "test_loss", "eta", "gradient_summary", "params"):
        assert other[name] == pytest.approx(one[name], rel=1e-10), name
    assert other["batch_stats"] == pytest.approx(one["batch_stats"], rel=1e-9, abs=1e-9)


SENT = """
import functools, re
import jax, jax.numpy as jnp
import models
from models import cpu_convolution
from input_pipeline.batch import Batch
from training import sharding, step
from training.config import TrainConfig
from training.plan import make_plan

# As on an accelerator: the gradient of a kernel in one piece.
cpu_convolution.form_of = lambda *_: "native"
models.create = functools.partial(models.create, width=8)
config = TrainConfig(arch="resnet18", train_bs=64, mesh="data=8", bn_group={bn_group}).resolved()
mesh = sharding.make_mesh(config)
plan = make_plan(config, mesh)
like = functools.partial(jax.ShapeDtypeStruct, sharding=sharding.over_batch(mesh))
float32, int32 = jnp.float32, jnp.int32
batch = Batch(like((64, 8, 8, 1), float32), like((64,), int32), like((64,), float32))
take = functools.partial(step.train_step, plan.graphdef, plan.tx, step.LOSSES["mse"])
compiled = jax.jit(take, out_shardings=(plan.shardings, sharding.replicated(mesh)))
for line in compiled.lower(plan.abstract_state, batch).compile().as_text().splitlines():
    if found := re.search(r"= (.*) (all|collective|reduce-scatter)[a-z-]*\\(", line):
        print(line.split(" = ")[0].strip(" %").split(".")[0], len(re.findall(r"\\[\\d", found[1])))
"""


@pytest.mark.slow
def test_groups_that_a_device_holds_leave_one_sum_to_send():
    def sent(bn_group):
        command = [sys.executable, "-c", SENT.format(bn_group=bn_group)]
        run = subprocess.run(command, cwd=ROOT, env=EIGHT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        sums = [line.split() for line in run.stdout.splitlines()]
        assert {name for name, _ in sums} == {"all-reduce"}
        # How many arrays each of them has, besides scalars.
        return sorted(int(arrays) for _, arrays in sums if int(arrays))

    # 21 gradients, and in the same sum the averages: 16 means and as many variances.
    assert sent(8) == sent(4) == [21 + 2 * 16]
    # Those of the whole batch are needed one after the other, forward and backward.
    assert len(sent(0)) > 30


def mesh_of(**sizes):
    return AbstractMesh(tuple(sizes.values()), tuple(sizes))


@pytest.mark.parametrize(
    ("sizes", "shape", "dense", "expected"),
    [
        # ZeRO-3: the largest axis that can be divided.
        ({"fsdp": 8}, (64, 256), 0, (None, "fsdp")),
        ({"fsdp": 8}, (3, 3, 64, 36), 0, (None, None, "fsdp", None)),
        # Dense layers by turns: outputs, then inputs.
        ({"model": 2}, (64, 256), 0, (None, "model")),
        ({"model": 2}, (256, 256), 1, ("model", None)),
        ({"model": 4}, (256, 10), 2, ("model", None)),
        ({"fsdp": 2, "model": 2}, (64, 256), 0, ("fsdp", "model")),
    ],
)
def test_the_rule_by_which_a_parameter_is_split(sizes, shape, dense, expected):
    mesh = mesh_of(**({"data": 1, "fsdp": 1, "model": 1} | sizes))
    assert sharding._partition(mesh, shape, dense) == PartitionSpec(*expected)


SIZE = st.sampled_from([1, 2, 3, 4, 8])


@given(
    sizes=st.fixed_dictionaries({"data": SIZE, "fsdp": SIZE, "model": SIZE}),
    shape=st.lists(st.integers(0, 12) | st.sampled_from([64, 96]), max_size=5).map(tuple),
    dense=st.integers(0, 3),
)
def test_a_parameter_is_split_evenly_and_where_that_is_possible(sizes, shape, dense):
    spec = sharding._partition(mesh_of(**sizes), shape, dense)
    split = {name: length for name, length in zip(spec, shape, strict=True) if name}
    assert len(split) == len([name for name in spec if name]), "a mesh axis is used once"
    assert split.keys() <= ({"fsdp", "model"} if len(shape) == 2 else {"fsdp"})
    assert all(sizes[name] > 1 and length % sizes[name] == 0 for name, length in split.items())
    whole = [length for name, length in zip(spec, shape, strict=True) if not name]
    possible = {name: [n for n in whole if n % size == 0] for name, size in sizes.items()}
    if sizes["fsdp"] > 1:
        assert max(possible["fsdp"], default=-1) <= split.get("fsdp", -1), "the largest of them"
    if sizes["model"] > 1 and len(shape) == 2:
        assert "model" in split or not possible["model"]


def test_by_default_all_devices_are_on_data():
    mesh = sharding.make_mesh(TrainConfig().resolved(), jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "model": 1}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mesh": "data=4"}, "--mesh data=4: takes 4 devices; make the product of the sizes 8"),
        ({"train_bs": 100}, "--train_bs 100: not a multiple of the 8 devices .* 96 or 104"),
        ({"train_bs": 3}, "--train_bs 3: .*; 8 would be"),
        (
            {"mesh": "fsdp=2,model=4", "test_bs": 7},
            "--test_bs 7: not a multiple of the 2 .* 6 or 8",
        ),
    ],
)
def test_what_does_not_fit_the_devices_is_said(fields, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        sharding.make_mesh(TrainConfig(**fields).resolved(), [None] * 8)
