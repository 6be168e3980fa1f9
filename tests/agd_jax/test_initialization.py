import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from agd_jax import orthogonal_init
from agd_jax.geometry import scale

SHAPES = [(32, 8), (8, 32), (16, 16), (3, 3, 8, 4), (3, 3, 4, 8), (1, 1, 6, 6), (2, 5, 7, 3, 9)]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_tap_is_semi_orthogonal_with_the_scale_of_its_parameter(shape):
    weights = np.asarray(orthogonal_init(jax.random.key(0), jnp.zeros(shape)))
    *taps, d_in, d_out = shape
    expected = np.sqrt(d_out / d_in) / np.sqrt(np.prod(taps))
    assert scale(shape) == pytest.approx(expected, rel=1e-12)
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
