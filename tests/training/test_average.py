"""The averaged weights of a run: tested, saved, loaded, exported."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from input_pipeline import resident
from input_pipeline.batch import Batch, normalise
from input_pipeline.specs import SPECS
from models.layers import BatchNorm
from tests.helpers import ROOT, read_records, same, small_resnet18
from tests.images import write_tree
from training import checkpoints
from training.config import TrainConfig
from training.errors import ConfigError
from training.feeds.feed import STATISTICS_IMAGES, statistics_images
from training.run import evaluate, train
from training.state import split
from training.step import statistics_step

FIELDS = {"arch": "fcn", "depth": 3, "width": 16, "epochs": 2, "average": True, "platform": "cpu"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that has ended, not to be changed."""
    return train(TrainConfig(workdir=tmp_path_factory.mktemp("averaged"), **FIELDS))


def accuracy_and_loss(model, config):
    """Those of a loaded network on the digits."""
    test = resident.load(SPECS["digits"]).test
    logits = model(normalise(config.spec, jnp.asarray(test.images), jnp.float32))
    target = np.sqrt(10) * np.eye(10)[test.labels]
    return np.mean(np.argmax(logits, axis=1) == test.labels), np.mean((logits - target) ** 2)


@pytest.mark.parametrize("plain", [False, True])
def test_what_is_loaded_is_what_was_tested(trained, plain):
    last = trained.records[-1]
    model, config = checkpoints.load(trained.workdir, "last", plain=plain)
    kind = "plain_test" if plain else "test"
    expected = [getattr(last, f"{kind}_{name}") for name in ("accuracy", "loss")]
    assert accuracy_and_loss(model, config) == pytest.approx(expected, rel=1e-5)
    arrays = trained.state.model if plain else trained.averaged
    assert same(nnx.state(model, nnx.Param), arrays["params"])


def test_the_average_is_that_of_the_library(trained):
    assert same(trained.averaged["params"], trained.state.opt_state.average)
    assert not same(trained.averaged["params"], trained.state.params)
    last = trained.records[-1]
    assert last.test_loss != last.plain_test_loss
    assert read_records(trained.workdir)[-1]["plain_test_loss"] == last.plain_test_loss


def test_eval_only_prints_both(trained):
    last = trained.records[-1]
    rows = {row.which: row for row in evaluate(TrainConfig(workdir=trained.workdir))}
    assert list(rows) == ["best", "best plain", "last", "last plain"]
    assert rows["last"].loss == pytest.approx(last.test_loss, rel=1e-6)
    assert rows["last plain"].loss == pytest.approx(last.plain_test_loss, rel=1e-6)


@pytest.mark.parametrize("flags", [(), ("--plain",)])
def test_export(trained, tmp_path, flags):
    import safetensors.numpy

    file = tmp_path / "weights.safetensors"
    command = [sys.executable, "-m", "training.export", trained.workdir, file, *flags]
    run = subprocess.run([*command, "--which", "last"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    arrays = trained.state.model if flags else trained.averaged
    expected = nnx.to_pure_dict(arrays["params"])["layers"][0]["kernel"]
    exported = safetensors.numpy.load_file(file)["layers.0.kernel"]
    np.testing.assert_array_equal(exported, expected)


def test_a_run_without_it_cannot_go_on_with_it_nor_the_reverse(trained, tmp_path):
    fields = FIELDS | {"epochs": 3, "average": False}
    with pytest.raises(ConfigError, match=r"^--no_average: .* holds a run with --average; give"):
        train(TrainConfig(workdir=trained.workdir, **fields))
    train(TrainConfig(workdir=tmp_path, **(fields | {"epochs": 1})))
    with pytest.raises(ConfigError, match=r"^--average: .* holds a run with --no_average; give"):
        train(TrainConfig(workdir=tmp_path, **FIELDS))


def test_images_for_statistics_are_spread_evenly_and_fill_batches():
    assert statistics_images(10, 4).tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    assert statistics_images(5, 5).tolist() == [0, 1, 2, 3, 4]
    large = statistics_images(1_281_167, 256)
    assert len(large) == STATISTICS_IMAGES
    assert set(np.diff(large)) == {312, 313}
    assert len(statistics_images(1_281_167, 6144)) == 6144


@pytest.mark.parametrize("group", [0, 4])
def test_statistics_are_means_over_batches(group):
    class Network(nnx.Module):
        def __init__(self):
            dtypes = {"dtype": jnp.float32, "param_dtype": jnp.float32, "rngs": nnx.Rngs(0)}
            self.dense = nnx.Linear(6, 5, rngs=nnx.Rngs(1))
            self.norm = BatchNorm(5, group=group, **dtypes)

        def __call__(self, x):
            return self.norm(self.dense(x))

    graphdef, params, mean = split(Network())
    images = np.random.RandomState(0).standard_normal((3, 8, 6)).astype(np.float32)
    take = jax.jit(functools.partial(statistics_step, graphdef))
    for number, x in enumerate(images, 1):
        mean = take(params, mean, Batch(x, np.zeros(8, int), np.ones(8)), number)

    hidden = images @ params["dense"]["kernel"][...] + params["dense"]["bias"][...]
    grouped = hidden.reshape(-1, group or 8, 5)
    expected = {"mean": grouped.mean((0, 1)), "var": grouped.var(1, ddof=1).mean(0)}
    for name, value in expected.items():
        np.testing.assert_allclose(mean["norm"][name][...], value, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [False, True])
def test_statistics_are_those_of_the_averaged_network(tmp_path, monkeypatch, streamed):
    """Taken here of all of its training images at once, after a run that ends within an epoch."""
    small_resnet18(monkeypatch)
    fields = FIELDS | {"arch": "resnet18", "depth": None, "width": None, "epochs": 1}
    if streamed:
        tree = write_tree(tmp_path / "imagenet", train=24, test=10)
        fields |= {"dataset": "imagenet", "data_dir": str(tree), "image_size": 16, "workers": 0}
        fields |= {"train_bs": 24, "test_bs": 5}
    else:
        fields |= {"train_bs": 1437}
    result = train(TrainConfig(workdir=tmp_path / "run", **fields))
    assert not same(result.averaged["batch_stats"], result.state.batch_stats)
    model, config = checkpoints.load(tmp_path / "run")
    assert same(nnx.state(model, nnx.BatchStat), result.averaged["batch_stats"])
    if streamed:
        return
    last = result.records[-1]
    expected = pytest.approx([last.test_accuracy, last.test_loss], rel=1e-4)
    assert accuracy_and_loss(model, config) == expected
    train_split = resident.load(SPECS["digits"]).train
    images = normalise(config.spec, jnp.asarray(train_split.images), jnp.float32)
    model.train()
    model.set_attributes(nnx.BatchNorm, momentum=0.0)
    model(images)
    of_model = jax.tree.leaves(nnx.state(model, nnx.BatchStat))
    for ours, expected in zip(
        jax.tree.leaves(result.averaged["batch_stats"]), of_model, strict=True
    ):
        np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-4)
