"""Six networks against a reference run in double precision, over three AGD steps."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import agd_jax
import models
from training.step import LOSSES

GOLDEN = json.loads((Path(__file__).parent / "golden" / "models.json").read_text())
# case -> (--arch, its options, relative error allowed in float64)
CASES = {
    "fcn_depth4_width64": ("fcn", {"depth": 4, "width": 64}, 1e-8),
    "fcn_depth10_width256": ("fcn", {"depth": 10, "width": 256}, 1e-8),
    "vgg16_cifar": ("vgg", {}, 1e-8),
    "resnet18_cifar": ("resnet18", {}, 1e-8),
    "resnet50_cifar": ("resnet50", {}, 1e-6),
    "resnet50_imagenet": ("resnet50", {}, 1e-6),
}


@pytest.fixture(autouse=True, scope="module")
def optimized():
    """Convolutions that are large take longer than XLA takes to optimise them."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


# Our names in the order in which the reference lists parameters.
RANK = {"stem": 0, "layers": 1, "convs": 1, "blocks": 1, "shortcut": 2, "head": 2, "kernel": 0}


def in_reference_order(tree):
    """The leaves of a tree of parameters, in the order in which the reference lists them."""

    def rank(path_and_leaf):
        keys = [k.key for k in path_and_leaf[0]]
        return [RANK.get(k, k) for k in keys]

    leaves = jax.tree.leaves_with_path(nnx.to_pure_dict(tree))
    return [leaf for _, leaf in sorted(leaves, key=rank)]


def golden_weights(case, flatten_first):
    """Every weight in the listed order, with its axes in Flax's."""
    _, channels, height, width = case["input_shape_nchw"]
    for number, (_, shape) in enumerate(case["params"]):
        drawn = np.random.RandomState(1000 + number).standard_normal(shape)
        weight = drawn / np.sqrt(np.prod(shape[1:]))
        if number == 0 and flatten_first:
            # The reference flattens its input channel-first, we channel-last.
            weight = weight.reshape(-1, channels, height, width).transpose(0, 2, 3, 1)
            weight = weight.reshape(shape)
        yield weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight.T


def build(name, dtype):
    """Returns (graphdef, params, batch_stats, images, labels) of a golden case."""
    case, (arch, options, _) = GOLDEN[name], CASES[name]
    nchw, classes = case["input_shape_nchw"], case["num_classes"]
    images = np.random.RandomState(0).standard_normal(nchw).transpose(0, 2, 3, 1)
    labels = np.random.RandomState(1).randint(0, classes, nchw[0])
    types = {"dtype": dtype, "param_dtype": dtype, "rngs": nnx.Rngs(0)}
    model = models.create(arch, images.shape[1:], classes, **types, **options)
    graphdef, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)

    weights = list(golden_weights(case, flatten_first=arch == "fcn"))
    ours = in_reference_order(params)
    assert [p.shape for p in ours] == [w.shape for w in weights]
    assert sum(p.size for p in ours) == case["num_parameters"]
    by_place = {id(p): jnp.asarray(w, dtype) for p, w in zip(ours, weights, strict=True)}
    params = jax.tree.map(lambda p: by_place[id(p)], params)
    return graphdef, params, batch_stats, jnp.asarray(images, dtype), labels


def train(name, dtype, steps):
    """Takes AGD steps as the reference does; returns what it measured, and logits for testing."""
    graphdef, params, batch_stats, images, labels = build(name, dtype)
    tx, loss = agd_jax.agd(), GOLDEN[name]["loss"]

    def norms(tree):
        return [jnp.linalg.norm(leaf) for leaf in in_reference_order(tree)]

    @jax.jit
    def step(params, batch_stats, state):
        def objective(params):
            model = nnx.merge(graphdef, params, batch_stats, copy=True)
            model.train()
            logits = model(images)
            losses = {name: jnp.mean(f(logits, labels)) for name, f in LOSSES.items()}
            return losses[loss], (logits, losses, nnx.state(model, nnx.BatchStat))

        gradient = jax.grad(objective, has_aux=True)
        grads, (logits, losses, batch_stats) = gradient(params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        measured = {
            "square_loss": losses["mse"],
            "cross_entropy": losses["xent"],
            "logits_first_example": logits[0, :10],  # all that the reference wrote down
            "grad_norms": norms(grads),
            "gradient_summary": state.gradient_summary,
            "eta": state.eta,
            "param_norms_after": norms(params),
        }
        return params, batch_stats, state, measured

    history, state = [], tx.init(params)
    for _ in range(steps):
        params, batch_stats, state, measured = step(params, batch_stats, state)
        history.append(measured)
    model = nnx.merge(graphdef, params, batch_stats, copy=True)
    model.eval()
    return history, model(images[:1])[0]


QUICK = "fcn_depth4_width64"
NAMES = [n if n == QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES]


@pytest.mark.parametrize("name", NAMES)
def test_three_steps_match_the_reference_in_float64(name):
    case, (*_, tolerance) = GOLDEN[name], CASES[name]
    with jax.enable_x64(True):
        history, eval_logits = train(name, jnp.float64, steps=3)
    for number, (measured, expected) in enumerate(zip(history, case["steps"], strict=True)):
        for quantity, value in expected.items():
            np.testing.assert_allclose(
                measured[quantity], value, rtol=tolerance, err_msg=f"{quantity} at step {number}"
            )
    expected = np.array(case["eval_logits_first_example_after_3_steps"])
    eval_logits = np.asarray(eval_logits)[: len(expected)]
    assert np.max(np.abs(eval_logits - expected)) < tolerance * np.max(np.abs(expected))


# Without the large images, which are the same network once more.
@pytest.mark.parametrize("name", [name for name in NAMES if "imagenet" not in str(name)])
def test_the_first_step_matches_the_reference_in_float32(name):
    (measured,), _ = train(name, jnp.float32, steps=1)
    for quantity, value in GOLDEN[name]["steps"][0].items():
        error = np.max(np.abs(np.asarray(measured[quantity]) - value)) / np.max(np.abs(value))
        assert error < 1e-3, quantity
