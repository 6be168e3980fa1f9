"""AGD trains very deep and very wide networks from the first step, with nothing set."""

import jax
import jax.numpy as jnp
import optax
import pytest
from sklearn.datasets import load_digits

import agd_jax

UNITS = 64


def relu(x):
    return jnp.sqrt(2.0) * jax.nn.relu(x)


def chain(params, x):
    x, _ = jax.lax.scan(lambda x, w: (relu(x @ w), None), relu(x @ params["in"]), params["hidden"])
    return x @ params["out"]


def residual(params, x):
    block = lambda x, w: (x + relu(jax.nn.standardize(x) @ w), None)
    x, _ = jax.lax.scan(block, x @ params["in"], params["hidden"])
    return jax.nn.standardize(x) @ params["out"]


def losses(apply, hidden, width, steps, tx=None):
    """The losses of full-batch steps on 256 digits: AGD's, or those of another optimiser."""
    images, labels = load_digits(return_X_y=True)
    x = jnp.asarray(images[:256]) - 8
    x *= jnp.sqrt(UNITS) / jnp.linalg.norm(x, axis=1, keepdims=True)
    y = jnp.sqrt(10.0) * jax.nn.one_hot(labels[:256], 10)
    shapes = {"in": (UNITS, width), "hidden": (hidden, width, width), "out": (width, 10)}
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    geometry = agd_jax.geometry_of(apply, params, x)
    params = agd_jax.orthogonal_init(jax.random.key(0), params, geometry)
    tx = tx or agd_jax.agd(geometry=geometry)
    loss = lambda params: jnp.mean(jnp.square(apply(params, x) - y))

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    return jax.lax.scan(step, (params, tx.init(params)), length=steps)[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("apply", "hidden", "width", "falls_to"),
    [(chain, 62, UNITS, 0.85), (residual, 62, UNITS, 0.05), (chain, 1, 2048, 0.3)],
)
def test_from_the_first_step(apply, hidden, width, falls_to):
    found = losses(apply, hidden, width, steps=60)
    assert found.max() == found[0]
    assert found[-1] < falls_to * found[0]


@pytest.mark.slow
def test_a_rate_that_is_usual_is_too_large_for_the_width():
    first, second = losses(chain, 1, 2048, 2, optax.adamw(1e-3))
    assert second > 2 * first
