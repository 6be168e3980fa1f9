"""What README's table says that agd() can be put into, and steps with each of them.

As a program, on eight virtual devices: takes the steps with parameters shared by a mesh and with
whole ones, and prints the names of those that agree.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import agd_jax

STEPS = 5
MATRICES = {"a": {"kernel": True}, "b": {"kernel": True}, "c": {"bias": False}}
LABELS = jax.tree.map(lambda matrix: "agd" if matrix else "adam", MATRICES)

agd = agd_jax.agd
COMPOSITIONS = {
    "agd": agd,
    "spectral": lambda: agd(norm="spectral"),
    "averaged": lambda: agd_jax.averaged(agd(norm="spectral")),
    "clip_by_global_norm": lambda: optax.chain(optax.clip_by_global_norm(0.1), agd()),
    "add_decayed_weights": lambda: optax.chain(optax.add_decayed_weights(0.1), agd()),
    "ema": lambda: optax.chain(optax.ema(0.9), agd()),
    "trace": lambda: optax.chain(optax.trace(0.9), agd()),
    "MultiSteps": lambda: optax.MultiSteps(agd(), every_k_schedule=2),
    "partition": lambda: optax.partition({"agd": agd(), "adam": optax.adam(1e-3)}, LABELS),
    "masked": lambda: optax.masked(agd(), MATRICES),
    "inject_hyperparams": lambda: optax.inject_hyperparams(agd)(gain=2.0),
    "a schedule": lambda: optax.inject_hyperparams(agd)(gain=optax.linear_schedule(1, 0, 3)),
    "apply_if_finite": lambda: optax.apply_if_finite(agd(), max_consecutive_errors=5),
    "schedule_free": lambda: optax.contrib.schedule_free(agd(), learning_rate=1.0),
    "lookahead": lambda: optax.lookahead(agd(), sync_period=2, slow_step_size=0.5),
}


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def tree(seed=0):
    kernels = {"a": {"kernel": normal(seed, 4, 8)}, "b": {"kernel": normal(seed + 1, 3, 3, 8, 2)}}
    return kernels | {"c": {"bias": normal(seed + 2, 8)}}


def params_of(name, seed=0):
    params = tree(seed)
    # Lookahead's slow and fast weights are two copies, to be donated both.
    copy = functools.partial(jax.tree.map, jnp.copy)
    return optax.LookaheadParams(copy(params), copy(params)) if name == "lookahead" else params


def step_of(tx):
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def take_steps(name, params, step=None):
    """The parameters and the state after some steps, each a call of ``step`` from Python."""
    tx = COMPOSITIONS[name]()
    step, state = step or step_of(tx), tx.init(params)
    for seed in range(STEPS):
        params, state = step(params, state, tree(10 * seed + 10))
    return params, state


def assert_same(name, found, expected):
    # The polynomials of orthogonal factors multiply rounding.
    rtol, atol = (1e-3, 1e-4) if name in ("spectral", "averaged") else (1e-5, 1e-6)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def on_a_mesh(name):
    mesh = jax.make_mesh((8,), ("fsdp",), (jax.sharding.AxisType.Auto,))

    def split(x):
        axes = [None] * x.ndim
        if 8 in x.shape:
            axes[x.shape.index(8)] = "fsdp"
        return jax.device_put(x, jax.NamedSharding(mesh, jax.P(*axes)))

    step = jax.jit(step_of(COMPOSITIONS[name]()), donate_argnums=(0, 1))
    assert_same(
        name,
        take_steps(name, jax.tree.map(split, params_of(name)), step),
        take_steps(name, params_of(name)),
    )


if __name__ == "__main__":
    for name in COMPOSITIONS:
        on_a_mesh(name)
        print(name)
