import inspect
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

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
    tx = agd_jax.agd(gain=gain)
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


@pytest.mark.parametrize(
    "gain",
    [0, -1.0, float("nan"), float("inf"), np.array(-0.5), jnp.array(-0.5), jnp.array(jnp.nan)],
    ids=str,
)
def test_a_gain_that_makes_no_sense_is_refused(gain):
    with pytest.raises(ValueError, match=r"gain must be positive and finite"):
        agd_jax.agd(gain=gain)


def test_a_gain_is_one_number():
    with pytest.raises(ValueError, match=r"takes one number, not an array of shape \(2,\)"):
        agd_jax.agd(gain=jnp.ones(2))


@pytest.mark.parametrize("make", [lambda: agd_jax.agd(1e-3), lambda: agd_jax.agd(learning_rate=1)])
def test_a_learning_rate_is_refused(make):
    with pytest.raises(TypeError, match=r"^agd\(\) has no learning rate: .* write agd\(\)"):
        make()
    parameters = inspect.signature(agd_jax.agd).parameters.values()
    assert [p.name for p in parameters] == ["geometry", "norm", "momentum", "gain"]
    assert {p.kind for p in parameters} == {inspect.Parameter.KEYWORD_ONLY}


def test_a_schedule_is_refused_with_what_to_do():
    with pytest.raises(TypeError, match=r"optax\.inject_hyperparams\(agd_jax\.agd\)\(gain=sch"):
        agd_jax.agd(gain=optax.constant_schedule(1.0))


class ConvBatchNorm(nnx.Module):
    """What is normalised over the batch does not depend on the convolution's bias."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.out = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


class Attention(nnx.Module):
    """Softmax does not depend on a key's bias."""

    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 3, 16, decode=False, rngs=rngs)
        self.out = nnx.Linear(3, 4, rngs=rngs)

    def __call__(self, x):
        return self.out(self.attention(x.reshape(len(x), -1, 3))).mean(1)


@pytest.mark.parametrize(
    ("make", "useless"),
    [
        (ConvBatchNorm, ("conv", "bias")),
        pytest.param(Attention, ("attention", "key", "bias"), marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore:from shapes alone")
def test_a_gradient_of_nothing_but_rounding_moves_nothing(make, useless):
    graphdef, params, rest = nnx.split(make(nnx.Rngs(0)), nnx.Param, ...)
    x = jax.random.normal(jax.random.key(1), (64, 8, 8, 3))
    y = jax.random.randint(jax.random.key(2), (64,), 0, 4)
    tx = agd_jax.agd()

    def loss(params):
        logits = nnx.merge(graphdef, params, rest, copy=True)(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def step(params, state):
        grads = jax.grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, grads

    before, state, noise = dict(nnx.to_flat_state(params)), tx.init(params), 0
    for _ in range(100):
        params, state, grads = step(params, state)
        noise += jnp.linalg.norm(dict(nnx.to_flat_state(grads))[useless][...])
    assert noise > 0
    for path, param in nnx.to_flat_state(params):
        moved = np.any(param[...] != before[path][...])
        assert moved == (path != useless), path


def test_noise_is_told_by_the_precision_of_its_own_gradient():
    with jax.enable_x64(True):
        grads = {"a": jnp.ones((4, 4), jnp.float32), "noise": jnp.full(4, 1e-7, jnp.float32)}
        grads["wide"] = jnp.ones((), jnp.float64)
        tx = agd_jax.agd()
        updates, _ = tx.update(grads, tx.init(grads), grads)
        assert [bool(np.any(updates[name])) for name in ("a", "noise", "wide")] == [
            True,
            False,
            True,
        ]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_not_hidden(bad):
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}
    grads = {"a": jnp.full((2, 2), bad), "b": jnp.ones((2, 2))}
    tx = agd_jax.agd()
    updates, state = tx.update(grads, tx.init(params), params)
    assert np.all(np.isnan(updates["a"]))
    assert not np.isfinite(state.gradient_summary)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("size", ["tiny", "small", "large", "huge"])
def test_a_finite_gradient_of_any_size_gives_a_finite_step_in_its_direction(dtype, size):
    with jax.enable_x64(dtype == "float64"):
        info = jnp.finfo(dtype)
        factor = {
            "tiny": 64 * float(info.tiny),
            "small": float(info.tiny) ** 0.6,
            "large": float(info.max) ** 0.6,
            "huge": float(info.max) / 8,
        }[size]
        rng = np.random.default_rng(0)
        unit = {"a": rng.uniform(-1, 1, (64, 32)), "b": rng.uniform(-1, 1, 32)}
        grads = jax.tree.map(lambda g: jnp.asarray(factor * g, dtype), unit)
        like = jax.tree.map(lambda g: jnp.asarray(g, dtype), unit)
        tx = optax.apply_if_finite(agd_jax.agd(), 1)
        updates, state = jax.jit(tx.update)(grads, tx.init(grads))
        expected, plain = agd_jax.agd().update(like, agd_jax.agd().init(like))
        assert state.last_finite
        eta, expected_eta = state.inner_state.eta, plain.eta
        if size in ("tiny", "small"):
            # For small G, eta is G; a step of the smallest ones is too small for their dtype.
            assert 0 < eta <= 10 * factor * plain.gradient_summary
        else:
            expected_eta = 0.5 * (jnp.log(plain.gradient_summary) + np.log(factor))
            np.testing.assert_allclose(eta, expected_eta, rtol=0.01)
        if size != "tiny":
            for name in grads:
                step = np.asarray(updates[name], "float64") / np.asarray(eta, "float64")
                direction = np.asarray(expected[name], "float64") / np.asarray(plain.eta, "float64")
                np.testing.assert_allclose(step, direction, rtol=0.02, atol=1e-3)


def test_a_power_of_two_changes_no_bit_but_of_eta():
    grads = jax.random.normal(jax.random.key(0), (16, 8))
    one, many = (
        agd_jax.agd().update({"w": f * grads}, agd_jax.agd().init({"w": grads}))
        for f in (1, 2.0**80)
    )
    assert many[1].gradient_summary == 2.0**80 * one[1].gradient_summary
    # At the same eta the steps are the same.
    ratio = many[1].eta / one[1].eta
    np.testing.assert_allclose(many[0]["w"], ratio * one[0]["w"], rtol=1e-6)


def test_complex_parameters_are_refused_with_what_to_do():
    params = {"w": jnp.ones((2, 2), complex)}
    with pytest.raises(TypeError, match=r"split_real_and_imaginary\(agd_jax\.agd\(\)\)"):
        agd_jax.agd().init(params)
    tx = optax.contrib.split_real_and_imaginary(agd_jax.agd())
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["w"].dtype == params["w"].dtype


def test_library_imports_jax_and_optax_alone():
    code = "import sys, agd_jax; print(*{m.split('.')[0] for m in sys.modules})"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    loaded = set(output.decode().split())
    assert {"jax", "optax", "agd_jax"} <= loaded
    assert not loaded & {"flax", "tyro", "rich", "models", "training", "input_pipeline"}
