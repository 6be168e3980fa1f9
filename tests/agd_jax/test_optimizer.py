import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import agd_jax
from agd_jax.optimizer import automatic_learning_rate

GOLDEN = np.load(Path(__file__).parent / "golden" / "optimizer.npz")
# case -> (gain, parameters, steps)
CASES = {
    "dense": (1.0, 3, 3),
    "conv": (1.0, 4, 3),
    "gain10": (10.0, 2, 3),
    "zero_tap": (1.0, 2, 3),
    "zero_layer": (1.0, 2, 3),
}


def golden(name):
    """A golden array with its axes in Flax's order."""
    array = GOLDEN[name]
    return jnp.asarray(array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T)


def steps(case):
    """Yields (eta, golden eta, params, golden params) after each step of a case."""
    gain, count, length = CASES[case]
    tx = agd_jax.agd(gain)
    params = [golden(f"{case}/param{i}/0") for i in range(count)]
    state = tx.init(params)
    for t in range(length):
        grads = [golden(f"{case}/grad{i}/{t}") for i in range(count)]
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        expected = [golden(f"{case}/param{i}/{t + 1}") for i in range(count)]
        yield state.eta, golden(f"{case}/eta/{t}"), params, expected


@pytest.mark.parametrize("case", CASES)
def test_golden_steps_in_float64(case):
    with jax.enable_x64(True):
        for eta, golden_eta, params, golden_params in steps(case):
            np.testing.assert_allclose(eta, golden_eta, rtol=1e-12)
            for param, expected in zip(params, golden_params, strict=True):
                assert param.dtype == jnp.float64
                np.testing.assert_allclose(param, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_golden_steps_in_float32(case):
    for eta, golden_eta, params, golden_params in steps(case):
        np.testing.assert_allclose(eta, golden_eta, rtol=1e-5)
        for param, expected in zip(params, golden_params, strict=True):
            assert param.dtype == jnp.float32
            np.testing.assert_allclose(param, expected, rtol=0, atol=1e-5)


def test_all_zero_gradients_move_nothing():
    params = {"dense": jnp.ones((3, 2)), "conv": jnp.ones((3, 3, 2, 4)), "bias": jnp.ones(2)}
    tx = agd_jax.agd()
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert all(np.all(np.asarray(u) == 0) for u in jax.tree.leaves(updates))
    assert state == (0, 0)


def test_nan_gradient_is_not_hidden():
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}
    grads = {"a": jnp.full((2, 2), jnp.nan), "b": jnp.ones((2, 2))}
    tx = agd_jax.agd()
    updates, _ = tx.update(grads, tx.init(params), params)
    assert all(np.all(np.isnan(u)) for u in jax.tree.leaves(updates))


@pytest.mark.parametrize(
    ("param_dtype", "grad_dtype"),
    [(jnp.bfloat16, jnp.float32), (jnp.float32, jnp.bfloat16), (jnp.float16, jnp.float16)],
)
def test_norms_are_float32_and_updates_have_the_dtype_of_the_parameters(param_dtype, grad_dtype):
    # The squares overflow float16 and their sum does not fit bfloat16's 8 bits.
    grads = {"w": jnp.full((300, 100), 300.0, grad_dtype)}
    params = {"w": jnp.zeros((300, 100), param_dtype)}
    tx = agd_jax.agd()
    updates, state = tx.update(grads, tx.init(params), params)
    scale = np.sqrt(100 / 300)
    summary = scale * float(grads["w"][0, 0]) * np.sqrt(300 * 100)
    eta = np.log((1 + np.sqrt(1 + 4 * summary)) / 2)
    assert state.eta.dtype == state.gradient_summary.dtype == jnp.float32
    np.testing.assert_allclose(state.gradient_summary, summary, rtol=1e-5)
    np.testing.assert_allclose(state.eta, eta, rtol=1e-5)
    assert updates["w"].dtype == param_dtype
    expected = -eta * scale / np.sqrt(300 * 100)
    np.testing.assert_allclose(updates["w"].astype(np.float32), expected, rtol=1e-2)


def test_without_params_updates_have_the_dtype_of_the_gradients():
    grads = [jnp.ones((2, 3), jnp.bfloat16)]
    tx = agd_jax.agd()
    updates, _ = tx.update(grads, tx.init(grads))
    assert updates[0].dtype == jnp.bfloat16


def test_state_is_two_scalars_and_keeps_its_dtype_in_a_scan():
    params = jnp.ones((4, 4), jnp.bfloat16)
    tx = agd_jax.agd()

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(params.astype(jnp.float32), state, params)
        return (optax.apply_updates(params, updates), state), state.eta

    (_, state), etas = jax.lax.scan(step, (params, tx.init(params)), length=3)
    assert [leaf.shape for leaf in jax.tree.leaves(state)] == [(), ()]
    assert etas[-1] == state.eta


@pytest.mark.parametrize("summary", [1e-30, 1e-9, 1e-3, 1.0, 1e3, 1e9])
def test_eta_is_accurate_over_all_magnitudes(summary):
    # eta = log((1 + sqrt(1 + 4 G)) / 2), by a series where that formula itself cancels.
    exact = summary if summary < 1e-8 else np.log((1 + np.sqrt(1 + 4 * np.float64(summary))) / 2)
    np.testing.assert_allclose(automatic_learning_rate(np.float32(summary)), exact, rtol=1e-6)


def test_eta_minimises_the_bound():
    with jax.enable_x64(True):
        for summary in (0.01, 1.0, 30.0):
            slope = jax.grad(lambda eta, g=summary: -eta * g + (jnp.exp(eta) - 1) ** 2 / 2)
            assert abs(slope(automatic_learning_rate(summary))) < 1e-12 * (1 + summary)


@pytest.mark.parametrize("gain", [0, -1.0, float("nan"), float("inf")])
def test_a_gain_that_makes_no_sense_is_refused(gain):
    with pytest.raises(ValueError, match=r"gain must be positive and finite"):
        agd_jax.agd(gain)


def test_library_imports_jax_and_optax_alone():
    code = "import sys, agd_jax; print(*{m.split('.')[0] for m in sys.modules})"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    loaded = set(output.decode().split())
    assert {"jax", "optax", "agd_jax"} <= loaded
    assert not loaded & {"flax", "tyro", "rich", "models", "training", "input_pipeline"}
