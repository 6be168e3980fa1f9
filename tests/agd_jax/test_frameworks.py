"""The same network in NNX, Linen, Equinox and Haiku takes the same steps."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import agd_jax

D, HEADS, HIDDEN, CLASSES = 8, 2, 16, 4
BATCH, TOKENS, SIDE = 6, 5, 6


def weights(shapes):
    """Starting weights by name, in float64: kernels with inputs before outputs."""
    rng = np.random.default_rng(0)
    return {
        name: jnp.asarray(rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1])))
        for name, shape in shapes.items()
    }


def nnx_apply(model):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    return (lambda p, x: nnx.merge(graphdef, p, rest, copy=True)(x)), params


def linen_apply(model, x):
    return model.apply, model.init(jax.random.key(0), x)


def equinox_apply(model, mapped):
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return (lambda p, x: jax.vmap(lambda x: mapped(eqx.combine(p, static), x))(x)), params


def haiku_apply(function, x):
    transformed = hk.without_apply_rng(hk.transform(function))
    return transformed.apply, transformed.init(jax.random.key(0), x)


def filled(params, by_order):
    """The tree with other values, which are listed in its order and reshaped."""
    leaves, structure = jax.tree.flatten(params)
    assert len(leaves) == len(by_order)
    new = [value.reshape(leaf.shape) for leaf, value in zip(leaves, by_order, strict=True)]
    return jax.tree.unflatten(structure, new)


def mlp():
    vectors = dict.fromkeys("bgo", (HIDDEN,))
    w = weights({"a": (D, HIDDEN), "c": (HIDDEN, CLASSES)} | vectors)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(BATCH, D)))

    class Nnx(nnx.Module):
        def __init__(self):
            types = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
            self.first = nnx.Linear(D, HIDDEN, **types)
            self.norm = nnx.LayerNorm(HIDDEN, epsilon=1e-5, use_fast_variance=False, **types)
            self.last = nnx.Linear(HIDDEN, CLASSES, use_bias=False, **types)

        def __call__(self, x):
            return self.last(self.norm(jnp.tanh(self.first(x))))

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            types = {"param_dtype": jnp.float64}
            x = jnp.tanh(nn.Dense(HIDDEN, **types)(x))
            x = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, **types)(x)
            return nn.Dense(CLASSES, use_bias=False, **types)(x)

    keys = jax.random.split(jax.random.key(0))
    equinox = eqx.nn.Sequential(
        [
            eqx.nn.Linear(D, HIDDEN, key=keys[0], dtype=jnp.float64),
            eqx.nn.Lambda(jnp.tanh),
            eqx.nn.LayerNorm(HIDDEN, dtype=jnp.float64),
            eqx.nn.Linear(HIDDEN, CLASSES, use_bias=False, key=keys[1], dtype=jnp.float64),
        ]
    )

    def haiku(x):
        x = jnp.tanh(hk.Linear(HIDDEN)(x))
        x = hk.LayerNorm(-1, True, True)(x)
        return hk.Linear(CLASSES, with_bias=False)(x)

    return x, {
        "nnx": (nnx_apply(Nnx()), [w["b"], w["a"], w["c"], w["o"], w["g"]]),
        "linen": (linen_apply(Linen(), x), [w["b"], w["a"], w["c"], w["o"], w["g"]]),
        "equinox": (
            equinox_apply(equinox, lambda model, x: model(x)),
            [w["a"].T, w["b"], w["g"], w["o"], w["c"].T],
        ),
        "haiku": (haiku_apply(haiku, x), [w["o"], w["g"], w["b"], w["a"], w["c"]]),
    }


def convolution():
    w = weights({"a": (3, 3, 3, HIDDEN), "b": (HIDDEN,), "c": (HIDDEN, CLASSES)})
    x = jnp.asarray(np.random.default_rng(1).normal(size=(BATCH, SIDE, SIDE, 3)))

    class Nnx(nnx.Module):
        def __init__(self):
            types = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
            self.first = nnx.Conv(3, HIDDEN, (3, 3), **types)
            self.last = nnx.Linear(HIDDEN, CLASSES, use_bias=False, **types)

        def __call__(self, x):
            return self.last(jnp.mean(jnp.tanh(self.first(x)), axis=(1, 2)))

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = jnp.tanh(nn.Conv(HIDDEN, (3, 3), param_dtype=jnp.float64)(x))
            x = jnp.mean(x, axis=(1, 2))
            return nn.Dense(CLASSES, use_bias=False, param_dtype=jnp.float64)(x)

    keys = jax.random.split(jax.random.key(0))
    equinox = (
        eqx.nn.Conv2d(3, HIDDEN, 3, padding=1, key=keys[0], dtype=jnp.float64),
        eqx.nn.Linear(HIDDEN, CLASSES, use_bias=False, key=keys[1], dtype=jnp.float64),
    )

    def channels_first(model, x):
        first, last = model
        return last(jnp.mean(jnp.tanh(first(x.transpose(2, 0, 1))), axis=(1, 2)))

    def haiku(x):
        x = jnp.mean(jnp.tanh(hk.Conv2D(HIDDEN, 3)(x)), axis=(1, 2))
        return hk.Linear(CLASSES, with_bias=False)(x)

    return x, {
        "nnx": (nnx_apply(Nnx()), [w["b"], w["a"], w["c"]]),
        "linen": (linen_apply(Linen(), x), [w["b"], w["a"], w["c"]]),
        "equinox": (
            equinox_apply(equinox, channels_first),
            [w["a"].transpose(3, 2, 0, 1), w["b"], w["c"].T],
        ),
        "haiku": (haiku_apply(haiku, x), [w["b"], w["a"], w["c"]]),
    }


def attention():
    names = ("query", "key", "value", "out")
    w = weights(dict.fromkeys(names, (D, D)) | {f"{n} bias": (D,) for n in names})
    x = jnp.asarray(np.random.default_rng(1).normal(size=(BATCH, TOKENS, D)))
    types = {"param_dtype": jnp.float64}
    by_name = lambda *order: [w[name] for name in order]

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x + nn.MultiHeadDotProductAttention(HEADS, **types)(x)

    def in_float64(query, key, value, **options):
        # NNX's own takes the softmax in float32.
        return nn.dot_product_attention(query, key, value)

    class Nnx(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.attention = nnx.MultiHeadAttention(
                HEADS, D, decode=False, rngs=rngs, attention_fn=in_float64, **types
            )

        def __call__(self, x):
            return x + self.attention(x)

    biases = dict.fromkeys(("use_query_bias", "use_key_bias", "use_value_bias"), True)
    equinox = eqx.nn.MultiheadAttention(
        HEADS, D, use_output_bias=True, key=jax.random.key(0), dtype=jnp.float64, **biases
    )

    def haiku(x):
        start = hk.initializers.VarianceScaling()
        attention = hk.MultiHeadAttention(HEADS, D // HEADS, w_init=start, model_size=D)
        return x + attention(x, x, x)

    sorted_ = by_name(*(name for n in sorted(names) for name in (f"{n} bias", n)))
    return x, {
        "linen": (linen_apply(Linen(), x), sorted_),
        "nnx": (nnx_apply(Nnx()), sorted_),
        "equinox": (
            equinox_apply(equinox, lambda model, x: x + model(x, x, x)),
            [v.T for n in names for v in by_name(n, f"{n} bias")],
        ),
        # Its layers are called key, linear (the last), query and value.
        "haiku": (
            haiku_apply(haiku, x),
            [v for n in ("key", "out", "query", "value") for v in by_name(f"{n} bias", n)],
        ),
    }


@pytest.mark.slow
@pytest.mark.parametrize("network", [mlp, convolution, attention])
def test_the_same_network_takes_the_same_steps(network):
    """Three steps in float64, by the results of the network and by eta."""
    found = {}
    with jax.enable_x64(True):
        x, those = network()
        target = jnp.asarray(np.random.default_rng(2).normal(size=x.shape[:1]))
        for name, ((apply, params), values) in those.items():
            start = filled(params, values)
            tx = agd_jax.agd(geometry=agd_jax.geometry_of(apply, start, x))

            def loss(params, apply=apply):
                results = apply(params, x)
                return jnp.mean(jnp.square(results - target.reshape(-1, *[1] * (results.ndim - 1))))

            @jax.jit
            def step(params, state, tx=tx, loss=loss):
                updates, state = tx.update(jax.grad(loss)(params), state, params)
                return optax.apply_updates(params, updates), state

            results, etas, state = [apply(start, x)], [], tx.init(start)
            for _ in range(3):
                start, state = step(start, state)
                results.append(apply(start, x))
                etas.append(state.eta)
            found[name] = np.array(results), np.array(etas)
    first, *others = found
    assert np.abs(found[first][0][-1] - found[first][0][0]).max() > 1e-3
    for other in others:
        for ours, theirs in zip(found[first], found[other], strict=True):
            np.testing.assert_allclose(theirs, ours, rtol=1e-11, atol=1e-12, err_msg=other)
