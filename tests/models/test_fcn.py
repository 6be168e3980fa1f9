import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import agd_jax
from models.fcn import FCN
from training.losses import LOSSES

GOLDEN = json.loads((Path(__file__).parent / "golden" / "models.json").read_text())


def golden_kernels(case):
    """The weights of a golden network, in Flax's order of axes, inputs channel-last."""
    _, channels, height, width = case["input_shape_nchw"]
    for number, (_, shape) in enumerate(case["params"]):
        drawn = np.random.RandomState(1000 + number).standard_normal(shape)
        kernel = (drawn / np.sqrt(np.prod(shape[1:]))).T
        if number == 0:
            kernel = kernel.reshape(channels, height, width, -1)
            kernel = kernel.transpose(1, 2, 0, 3).reshape(-1, kernel.shape[-1])
        yield jnp.asarray(kernel)


@pytest.mark.parametrize(("depth", "width"), [(4, 64), (10, 256)])
def test_three_steps_match_the_reference_in_float64(depth, width):
    case = GOLDEN[f"fcn_depth{depth}_width{width}"]
    nchw, classes = case["input_shape_nchw"], case["num_classes"]
    with jax.enable_x64(True):
        images = np.random.RandomState(0).standard_normal(nchw).transpose(0, 2, 3, 1)
        labels = np.random.RandomState(1).randint(0, classes, nchw[0])
        options = {"depth": depth, "width": width, "param_dtype": jnp.float64}
        model = FCN(images.shape[1:], classes, dtype=jnp.float64, **options, rngs=nnx.Rngs(0))
        for layer, kernel in zip(model.layers, golden_kernels(case), strict=True):
            layer.kernel[...] = kernel
        graphdef, params = nnx.split(model)
        assert sum(p.size for p in jax.tree.leaves(params)) == case["num_parameters"]

        def objective(params):
            logits = nnx.merge(graphdef, params)(images)
            return jnp.mean(LOSSES[case["loss"]](logits, labels)), logits

        def norms(tree):
            layers = nnx.to_pure_dict(tree)["layers"]
            return [jnp.linalg.norm(layers[i]["kernel"]) for i in range(depth)]

        tx = agd_jax.agd()
        state = tx.init(params)
        for expected in case["steps"]:
            (_, logits), grads = jax.value_and_grad(objective, has_aux=True)(params)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            found = {
                "square_loss": jnp.mean(LOSSES["mse"](logits, labels)),
                "cross_entropy": jnp.mean(LOSSES["xent"](logits, labels)),
                "grad_norms": norms(grads),
                "gradient_summary": state.gradient_summary,
                "eta": state.eta,
                "logits_first_example": logits[0],
                "param_norms_after": norms(params),
            }
            for name, value in expected.items():
                np.testing.assert_allclose(found[name], value, rtol=1e-8, err_msg=name)
        logits = nnx.merge(graphdef, params)(images)
        golden_logits = case["eval_logits_first_example_after_3_steps"]
        np.testing.assert_allclose(logits[0], golden_logits, rtol=1e-8)


def test_precision_is_that_of_the_arithmetic_not_of_the_parameters():
    model = FCN((4, 4, 1), 10, depth=2, width=8, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    logits = model(jnp.ones((3, 4, 4, 1)))
    assert logits.shape == (3, 10)
    assert logits.dtype == jnp.bfloat16
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(nnx.state(model)))


def test_depth_one_is_a_linear_map():
    model = FCN((4, 4, 1), 10, depth=1, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (3, 4, 4, 1))
    np.testing.assert_allclose(model(-x), -model(x), atol=1e-6)
