"""What Optax's own optimisers are tested for, in the shape of optax/contrib/_common_test.py."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import agd_jax

pytestmark = [
    pytest.mark.filterwarnings("ignore:agd.. was given one bare vector:UserWarning"),
    pytest.mark.filterwarnings("ignore:from shapes alone:UserWarning"),
]

PARABOLA = jnp.array([-1.0, 10.0, 1.0]), jnp.array([1.0, -1.0, 1.0])
MATRIX = jnp.zeros((2, 2)), jnp.array([[3.0, -2.0], [1.0, 4.0]])
MIXED = (
    (jnp.zeros(3), jnp.zeros((2, 2))),
    (jnp.array([1.0, -1.0, 2.0]), jnp.array([[1.0, 0.0], [-1.0, 1.0]])),
)
ROSENBROCK = jnp.zeros(2), jnp.ones(2)
FLOATS = {"a": 0.0, "b": 3.0}, {"a": 1.0, "b": -1.0}
TARGETS = {
    "parabola": PARABOLA,
    "rosenbrock": ROSENBROCK,
    "matrix": MATRIX,
    "mixed": MIXED,
    "floats": FLOATS,
}


def objective(name):
    """The loss of a target, which is zero at its end."""
    if name == "rosenbrock":
        return lambda p: (1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2
    _, final = TARGETS[name]
    return lambda params: sum(
        jnp.sum(jnp.square(p - f))
        for p, f in zip(jax.tree.leaves(params), jax.tree.leaves(final), strict=True)
    )


def stepper(tx, loss, **extra):
    def step(params, state):
        grads = jax.grad(loss)(params)
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return step


@pytest.mark.parametrize("name", TARGETS)
def test_extra_arguments_are_accepted_and_nothing_compiles_again(name):
    tx, (params, _) = agd_jax.agd(), TARGETS[name]
    step = jax.jit(stepper(tx, objective(name), unexpected=1))
    start = jax.tree.map(jnp.float32, params), tx.init(params)
    second = step(*step(*start))
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(second))
    assert step._cache_size() == 1


# Where there is no network, nothing says how large steps should be: around the minimum of a vector
# the Frobenius form goes to and fro, and in Rosenbrock's valley, 2,500 times as curved across as
# along, both forms do. There the gain is chosen, as others choose a rate.
@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
@pytest.mark.parametrize("name", TARGETS)
def test_it_converges(name, norm):
    gains = {("parabola", "frobenius"): 0.3, ("rosenbrock", norm): 3e-3}
    gain, steps = gains.get((name, norm), 1.0), 10_000 if name == "rosenbrock" else 1000
    tx, (params, final) = agd_jax.agd(norm=norm, gain=gain), TARGETS[name]
    step = stepper(tx, objective(name))
    params = jax.tree.map(jnp.float32, params)
    start = params, optax.tree.map_params(tx, lambda v: v, tx.init(params))
    (params, _), _ = jax.lax.scan(lambda carry, _: (step(*carry), None), start, length=steps)
    for found, expected in zip(jax.tree.leaves(params), jax.tree.leaves(final), strict=True):
        np.testing.assert_allclose(found, expected, atol=3e-2)


def test_floats_of_python_are_scalars():
    tx = agd_jax.agd()
    updates, state = tx.update({"a": 2.0}, tx.init({"a": 1.0}), {"a": 1.0})
    array = {"a": jnp.float32(1)}
    expected, _ = tx.update({"a": jnp.float32(2)}, tx.init(array), array)
    assert updates == expected
    assert state.eta == -updates["a"]


def test_it_can_be_wrapped_in_inject_hyperparams():
    params = [-jnp.ones((2, 3)), jnp.ones((2, 5, 2))]
    grads = jax.tree.map(jnp.negative, params)
    plain, wrapped = agd_jax.agd(gain=2.0), optax.inject_hyperparams(agd_jax.agd)(gain=2.0)
    updates, state = jax.jit(plain.update)(grads, jax.jit(plain.init)(params), params)
    others, other = jax.jit(wrapped.update)(grads, jax.jit(wrapped.init)(params), params)
    np.testing.assert_allclose(state, other.inner_state, rtol=1e-5)
    for found, expected in zip(others, updates, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_updates_have_the_dtype_of_params_and_can_be_accumulated(dtype):
    params = jnp.array([1.0, 2.0], dtype)
    tx = agd_jax.agd()
    updates, _ = jax.jit(tx.update)(2 * params, jax.jit(tx.init)(params), params)
    assert updates.dtype == dtype
    tx = optax.MultiSteps(tx, every_k_schedule=4)
    updates, _ = jax.jit(tx.update)(2 * params, jax.jit(tx.init)(params), params)
    assert not updates.any()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_the_state_keeps_its_shapes_and_dtypes(dtype):
    with jax.enable_x64(dtype == "float64"):
        tx = agd_jax.agd()
        params, final = (jnp.asarray(x, dtype) for x in PARABOLA)

        @jax.jit
        def step(params, state, move):
            grads = jax.grad(lambda p: jnp.sum(jnp.square(p - final)))(params)
            updates, state = jax.lax.cond(
                move, lambda: tx.update(grads, state, params), lambda: (params, state)
            )
            return optax.apply_updates(params, updates), state

        state = tx.init(params)
        for _ in range(2):
            params, new = step(params, state, True)
            assert params.dtype == dtype
            state = jax.lax.cond(True, lambda state=state: state, lambda new=new: new)
