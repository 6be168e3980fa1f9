"""What every network does, on images of every data set."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from input_pipeline.specs import SPECS
from models.layers import BatchNorm

# Of the paper, one of each kind; the others differ in depth alone.
PAPER = ("fcn", "vgg11", "resnet18", "resnet50")
# Those and all that are not of the paper.
ARCHS = (*PAPER, *(name for name, one in models.ARCHITECTURES.items() if not one.paper))


def abstract(arch, image_shape, classes=10, dtype=jnp.float32, **options):
    """A network without its numbers: shapes and dtypes alone."""
    types = {"dtype": dtype, "param_dtype": jnp.float32}
    make = lambda: models.create(arch, image_shape, classes, rngs=nnx.Rngs(0), **types, **options)
    return nnx.eval_shape(make)


def parameters(model):
    return sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize("dataset", SPECS)
@pytest.mark.parametrize(
    "arch",
    [pytest.param(a, marks=pytest.mark.slow) if a == "resnet50" else a for a in ARCHS],
)
def test_any_network_takes_any_data_set(arch, dataset):
    spec = SPECS[dataset]
    classes = spec.num_classes or 3  # Where only the data tell.
    graphdef, state = nnx.split(abstract(arch, spec.image_shape, classes, jnp.bfloat16))
    forward = lambda state, images: nnx.merge(graphdef, state)(images)
    images = jax.ShapeDtypeStruct((2, *spec.image_shape), jnp.float32)
    logits = jax.eval_shape(forward, state, images)
    assert logits.shape == (2, classes)
    assert logits.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("arch", PAPER)
def test_there_are_no_biases_scales_or_offsets(arch):
    params = nnx.to_pure_dict(nnx.state(abstract(arch, (32, 32, 3)), nnx.Param))
    paths = jax.tree.leaves_with_path(params)
    assert {path[-1].key for path, _ in paths} == {"kernel"}
    assert all(leaf.ndim in (2, 4) for _, leaf in paths)


@pytest.mark.parametrize(
    ("arch", "image_shape", "classes", "count"),
    [
        # As torchvision counts them, less biases and norms' scales and offsets.
        ("resnet18", (224, 224, 3), 1000, 11_678_912),
        ("resnet34", (224, 224, 3), 1000, 21_779_648),
        ("resnet50", (224, 224, 3), 1000, 25_502_912),
        pytest.param("resnet101", (224, 224, 3), 1000, 44_442_816, marks=pytest.mark.slow),
        pytest.param("resnet152", (224, 224, 3), 1000, 60_040_384, marks=pytest.mark.slow),
        ("vgg11", (32, 32, 3), 10, 9_222_848),
        ("vgg13", (32, 32, 3), 10, 9_407_168),
        ("vgg16", (32, 32, 3), 10, 14_715_584),
        ("vgg19", (32, 32, 3), 10, 20_024_000),
    ],
)
def test_parameter_counts(arch, image_shape, classes, count):
    assert parameters(abstract(arch, image_shape, classes)) == count


def test_vgg_is_vgg16():
    of = lambda arch: jax.tree.map(jnp.shape, nnx.state(abstract(arch, (32, 32, 3))))
    assert of("vgg") == of("vgg16")


@pytest.mark.slow
def test_vgg_pads_small_images_evenly_with_zeros():
    options = {"dtype": jnp.float32, "param_dtype": jnp.float32}
    build = lambda size: models.create("vgg11", (size, size, 1), 10, rngs=nnx.Rngs(0), **options)
    images = jax.random.normal(jax.random.key(0), (2, 28, 28, 1))
    padded = jnp.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    np.testing.assert_allclose(build(28)(images), build(32)(padded), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["vgg11", "resnet18"])
def test_training_moves_the_running_averages_and_testing_does_not(arch):
    options = {"dtype": jnp.float32, "param_dtype": jnp.float32}
    model = models.create(arch, (8, 8, 1), 10, rngs=nnx.Rngs(0), **options)
    images = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.BatchStat))
    model.eval()
    model(images)
    same = lambda a, b: all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))
    assert same(before, nnx.state(model, nnx.BatchStat))
    model.train()
    model(images)
    assert not same(before, nnx.state(model, nnx.BatchStat))


def test_batch_norm_averages_the_unbiased_variance():
    norm = BatchNorm(3, dtype=jnp.bfloat16, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = 2 + 3 * jax.random.normal(jax.random.key(0), (2, 2, 2, 3))
    y = norm(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.mean(y.astype(np.float32), (0, 1, 2)), 0, atol=1e-2)
    np.testing.assert_allclose(np.std(y.astype(np.float32), (0, 1, 2)), 1, atol=1e-2)
    mean, var = np.mean(x, (0, 1, 2)), np.var(x, (0, 1, 2), ddof=1)
    np.testing.assert_allclose(norm.mean[...], 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(norm.var[...], 0.9 + 0.1 * var, rtol=1e-5)
    # Of one value there is no variance, and no reason to end with a NaN.
    assert np.all(np.isfinite(norm(x[:1, :1, :1])))
    assert np.all(np.isfinite(norm.var[...]))


@pytest.mark.parametrize("arch", ["vgg11", "resnet18", "resnet50"])
@pytest.mark.parametrize("side", [32, 64])
def test_every_batch_norm_of_a_network_takes_the_same_groups(arch, side):
    model = abstract(arch, (side, side, 3), bn_group=4)
    norms = [m for _, m in nnx.iter_modules(model) if isinstance(m, BatchNorm)]
    assert norms
    assert {norm.group for norm in norms} == {4}


def test_each_group_is_normalised_as_a_batch_and_the_averages_are_the_mean_of_theirs():
    make = lambda group: BatchNorm(
        3, group=group, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0)
    )
    grouped, alone = make(2), [make(0) for _ in range(3)]
    # Each example has a level of its own, so which are together shows.
    x = jax.random.normal(jax.random.key(0), (6, 2, 2, 3)) + jnp.arange(6.0)[:, None, None, None]
    # In two steps, the second of which starts from averages that are no zeros and ones.
    for _ in range(2):
        y = grouped(x)
        expected = [norm(part) for norm, part in zip(alone, jnp.split(x, 3), strict=True)]
        np.testing.assert_allclose(y, jnp.concatenate(expected), atol=1e-5)
        for name in ("mean", "var"):
            averages = [getattr(norm, name)[...] for norm in alone]
            np.testing.assert_allclose(getattr(grouped, name)[...], sum(averages) / 3, rtol=1e-5)
    assert not np.allclose(y, make(0)(x), atol=0.1)

    # Evaluation knows no groups: five are no multiple of two.
    grouped.eval()
    mean, var = grouped.mean[...], grouped.var[...]
    np.testing.assert_allclose(grouped(x[:5]), (x[:5] - mean) / np.sqrt(var + 1e-5), rtol=1e-5)
