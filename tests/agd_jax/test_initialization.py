import subprocess
import sys

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from agd_jax import orthogonal_init
from agd_jax.geometry import Layout

SHAPES = [(32, 8), (8, 32), (16, 16), (3, 3, 8, 4), (3, 3, 4, 8), (1, 1, 6, 6), (2, 5, 7, 3, 9)]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_tap_is_semi_orthogonal_with_the_scale_of_its_parameter(shape):
    weights = np.asarray(orthogonal_init(jax.random.key(0), jnp.zeros(shape)))
    *taps, d_in, d_out = shape
    expected = np.sqrt(d_out / d_in) / np.sqrt(np.prod(taps))
    assert Layout.of_shape(shape).scale == pytest.approx(expected, rel=1e-12)
    for tap in weights.reshape(-1, d_in, d_out):
        small = tap @ tap.T if d_in < d_out else tap.T @ tap
        np.testing.assert_allclose(small, expected**2 * np.eye(len(small)), atol=1e-5)


def test_structure_dtypes_and_other_leaves_are_kept():
    params = {
        "kernel": jnp.zeros((4, 2), jnp.bfloat16),
        "host": np.zeros((2, 2), np.float16),
        "bias": jnp.full(3, 7.0),
        "table": jnp.ones((2, 2), jnp.int32),
        "nothing": None,
        "name": "relu",
    }
    drawn = orthogonal_init(jax.random.key(0), params)
    assert jax.tree.structure(drawn) == jax.tree.structure(params)
    assert drawn["kernel"].dtype == jnp.bfloat16
    assert drawn["host"].dtype == jnp.float16
    assert np.any(drawn["kernel"] != 0)
    assert np.any(drawn["host"] != 0)
    for name in ("bias", "table", "name"):
        assert drawn[name] is params[name]


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_attention_biases_are_kept_and_its_axes_warned_of(library):
    x = jnp.zeros((1, 5, 12))
    if library == "linen":
        model = nn.MultiHeadDotProductAttention(num_heads=3)
        params = model.init(jax.random.key(0), x)["params"]
    else:
        model = nnx.MultiHeadAttention(3, 12, decode=False, rngs=nnx.Rngs(0))
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    params = jax.tree.map(jnp.ones_like, params)
    with pytest.warns(UserWarning, match=r"key\.bias \(3, 4\), key\.kernel \(12, 3, 4\).* more"):
        drawn = orthogonal_init(jax.random.key(1), params)
    for layer in ("query", "key", "value", "out"):
        np.testing.assert_array_equal(drawn[layer]["bias"], params[layer]["bias"])
        assert np.any(drawn[layer]["kernel"] != params[layer]["kernel"])


def test_equinox_is_warned_of_and_its_convolution_biases_are_kept():
    model = eqx.nn.Conv2d(3, 32, 3, key=jax.random.key(0))
    params = eqx.filter(model, eqx.is_inexact_array)
    with pytest.warns(UserWarning, match=r"weight \(32, 3, 3, 3\), bias \(32, 1, 1\) that may"):
        drawn = orthogonal_init(jax.random.key(1), params)
    np.testing.assert_array_equal(drawn.bias, params.bias)


def test_what_is_read_right_is_not_warned_of(recwarn):
    params = {
        "dense": {"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(4)},
        "weight": jnp.eye(2),
        "conv": {"kernel": jnp.zeros((3, 3, 4, 4))},
        # A bias that is computed.
        "bias": {"kernel": jnp.zeros((3, 3))},
        "embedding": eqx.nn.Embedding(5, 3, key=jax.random.key(0)),
    }
    drawn = orthogonal_init(jax.random.key(0), params)
    assert not recwarn.list
    assert np.any(drawn["bias"]["kernel"] != 0)


def test_key_decides_and_leaves_differ():
    params = [jnp.zeros((4, 4)), jnp.zeros((4, 4))]
    draw = lambda seed: orthogonal_init(jax.random.key(seed), params)
    np.testing.assert_array_equal(draw(0)[0], draw(0)[0])
    assert np.any(draw(0)[0] != draw(1)[0])
    assert np.any(draw(0)[0] != draw(0)[1])


def test_sharding_is_kept_and_a_trace_is_no_obstacle():
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec(None, "data"))
    param = jax.device_put(jnp.zeros((4, 6)), sharding)
    drawn = orthogonal_init(jax.random.key(0), param)
    assert drawn.sharding == sharding
    traced = jax.jit(orthogonal_init)(jax.random.key(0), param)
    np.testing.assert_allclose(traced, drawn, atol=1e-6)


@pytest.mark.parametrize(("d_in", "d_out"), [(5, 5), (6, 3), (3, 6), (1, 4), (4, 1), (1, 1)])
@pytest.mark.filterwarnings("ignore:from shapes alone")
def test_taps_are_uniform_over_the_semi_orthogonal_matrices(d_in, d_out):
    count = 20_000
    drawn = np.asarray(orthogonal_init(jax.random.key(0), jnp.zeros((count, d_in, d_out))))
    matrices = drawn / Layout.of_shape(drawn.shape).scale
    n = max(d_in, d_out)  # Every entry is one of a uniform unit vector of n numbers.

    def check(values, mean, deviation):
        """Tests a mean of each of many independent values at five standard errors."""
        error = np.max(np.abs(np.mean(values, axis=0) - mean))
        assert error <= 5 * deviation / np.sqrt(count) + 1e-5

    check(matrices, 0, 1 / np.sqrt(n))
    # E x^2 = 1/n, E x^4 = 3 / (n (n + 2)), E x^8 = 105 / (n (n + 2) (n + 4) (n + 6))
    fourth, eighth = 3 / (n * (n + 2)), 105 / (n * (n + 2) * (n + 4) * (n + 6))
    check(matrices**2, 1 / n, np.sqrt(fourth - 1 / n**2))
    check(matrices**4, fourth, np.sqrt(eighth - fourth**2))
    # Invariance: a rotation from the left or the right leaves the distribution what it is, in
    # particular the correlations between entries, which a QR without its signs put right has.
    flat = matrices.reshape(count, -1)
    products = flat[:, :, None] * flat[:, None, :]
    check(products, np.eye(d_in * d_out) / n, 1 / np.sqrt(n))
    if d_in == d_out:
        check(np.linalg.det(matrices), 0, 1)  # both halves of the orthogonal group
        traces = np.trace(matrices, axis1=1, axis2=2)
        check(traces, 0, 1)
        check(traces**2, 1, 2)


@pytest.mark.slow
def test_the_draw_is_the_same_whatever_the_sharding():
    code = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from agd_jax import orthogonal_init

mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))
params = {"dense": jnp.zeros((16, 8)), "conv": jnp.zeros((3, 3, 8, 4)), "tall": jnp.zeros((64, 4))}
alone = orthogonal_init(jax.random.key(0), params)
for spec in (P(), P("data"), P(None, "model"), P(("data", "model"))):
    fits = lambda p: NamedSharding(mesh, spec if p.shape[0] % 8 == 0 else P())
    shardings = jax.tree.map(fits, params)
    spread = orthogonal_init(jax.random.key(0), jax.device_put(params, shardings))
    jitted = jax.jit(orthogonal_init, out_shardings=shardings)(jax.random.key(0), params)
    for name in params:
        assert spread[name].sharding == jitted[name].sharding == shardings[name]
        np.testing.assert_allclose(spread[name], alone[name], atol=1e-6)
        np.testing.assert_allclose(jitted[name], alone[name], atol=1e-6)
print("same on", len(jax.devices()))
"""
    env = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.stdout == "same on 8\n", run.stderr


@pytest.mark.slow
def test_many_kernels_in_one_program_do_not_hang_the_thread_pool():
    code = """
import jax, jax.numpy as jnp, agd_jax
shapes = [(3, 3, 64, 64)] * 4 + [(3, 3, 128, 128)] * 4 + [(3, 3, 256, 256)] * 3
draw = jax.jit(lambda key: agd_jax.orthogonal_init(key, [jnp.zeros(s) for s in shapes]))
print(len(jax.block_until_ready(draw(jax.random.key(0)))))
"""
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert run.stdout == "11\n"
