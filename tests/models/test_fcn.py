import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.fcn import FCN


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
