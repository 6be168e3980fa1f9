import jax
import jax.numpy as jnp

from benchmarks import linen_peer


def test_the_peer_is_resnet50():
    state, step = linen_peer.build(224, jnp.bfloat16)
    # Those of ours, with a scale and an offset for 26,560 channels of 53 BatchNorms, and a bias.
    assert sum(p.size for p in jax.tree.leaves(state.params)) == 25_502_912 + 2 * 26_560 + 1000
    assert sum(s.size for s in jax.tree.leaves(state.batch_stats)) == 2 * 26_560
    images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.bfloat16)
    new, measured = jax.eval_shape(step, state, images, jax.ShapeDtypeStruct((2,), jnp.int32))
    assert new == state
    assert {name: (m.shape, m.dtype) for name, m in measured.items()} == {
        "loss": ((), jnp.float32),
        "accuracy": ((), jnp.float32),
    }
