"""The average of weights along a run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import agd_jax


def test_weights_count_in_proportion_to_a_power_of_the_step():
    tx = agd_jax.averaged(optax.sgd(1.0))
    params, weights = jnp.zeros(3), []
    state = tx.init(params)
    for t in range(200):
        grads = jax.random.normal(jax.random.key(t), (3,))
        updates, state = jax.jit(tx.update)(grads, state, params)
        np.testing.assert_array_equal(updates, -grads)
        params = optax.apply_updates(params, updates)
        weights.append(params)
    # Of step t, (t + 9)! / (t - 1)!, which is t^10 but for the first steps.
    shares = np.array([np.prod(np.arange(t, t + 10.0)) for t in range(1, 201)])
    expected = shares @ np.array(weights, np.float64) / shares.sum()
    np.testing.assert_allclose(agd_jax.averaged_params(state, params), expected, rtol=1e-4)


def test_it_may_be_inside_and_keeps_float32_of_lower_precisions():
    params = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(3)}
    tx = optax.chain(optax.clip_by_global_norm(1.0), agd_jax.averaged(agd_jax.agd()))
    state = tx.init(params)
    _, state = tx.update(params, state, params)
    average = optax.tree.get(state, "average")
    assert {x.dtype for x in jax.tree.leaves(average)} == {np.dtype("float32")}
    found = agd_jax.averaged_params(state, params)
    assert jax.tree.map(lambda x: x.dtype, found) == jax.tree.map(lambda x: x.dtype, params)


def test_what_is_missing_is_said():
    tx = agd_jax.averaged(optax.sgd(1.0))
    with pytest.raises(ValueError, match=r"averaged\(\) needs the parameters"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
    with pytest.raises(ValueError, match=r"there are no averaged weights in this state"):
        agd_jax.averaged_params(optax.sgd(1.0).init(jnp.ones(2)), jnp.ones(2))
