"""agd() as a citizen of Optax, Flax and Equinox: each case against the step written in NumPy."""

import functools
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import agd_jax
from tests.agd_jax.compositions import (
    COMPOSITIONS,
    STEPS,
    assert_same,
    normal,
    params_of,
    step_of,
    take_steps,
    tree,
)


def agd_by_hand(grads, gain=1.0):
    """Updates, eta and G for a list of gradients, as section 3 of the paper has them."""

    def view(g):
        g = np.asarray(g, np.float64)
        g = g.reshape((1, -1) if g.ndim < 2 else g.shape)
        *taps, d_in, d_out = g.shape
        scale = np.sqrt(d_out / d_in) / np.sqrt(np.prod(taps))
        return g, scale, np.sqrt(np.sum(g**2, axis=(-2, -1), keepdims=True))

    views = [view(g) for g in grads]
    summary = np.mean([scale * norms.sum() for _, scale, norms in views])
    eta = np.log((1 + np.sqrt(1 + 4 * summary)) / 2)
    size = gain * eta / len(grads)
    updates = [-size * scale * g / norms for g, scale, norms in views]
    return [u.reshape(np.shape(g)) for u, g in zip(updates, grads, strict=True)], eta, summary


def assert_step(updates, grads, gain=1.0, rtol=1e-5):
    """Checks a tree of updates against a tree of what AGD was given."""
    expected, _, _ = agd_by_hand(jax.tree.leaves(grads), gain)
    found = jax.tree.leaves(updates)
    for u, e in zip(found, expected, strict=True):
        np.testing.assert_allclose(u, e, rtol=rtol, atol=1e-7)


PARAMS, GRADS = tree(0), tree(10)


@dataclass
class Layer:
    kernel: jax.Array
    bias: jax.Array


jax.tree_util.register_dataclass(Layer, ["kernel", "bias"], [])


@pytest.mark.parametrize(
    "structure",
    [
        lambda a, b, c: {"x": {"y": a, "z": b}, "w": c},
        lambda a, b, c: [a, [b, c]],
        lambda a, b, c: (a, (b,), c),
        lambda a, b, c: [Layer(a, c), b],
        lambda a, b, c: {"x": a, "none": None, "w": [b, None, c]},
        lambda a, b, c: a,
    ],
    ids=["dicts", "lists", "tuples", "dataclass", "with None", "a bare array"],
)
def test_any_container(structure):
    make = lambda seed: structure(normal(seed, 4, 6), normal(seed + 1, 2, 5), normal(seed + 2, 6))
    params, grads, tx = make(0), make(10), agd_jax.agd()
    updates, _ = tx.update(grads, tx.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert_step(updates, grads)


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4), (3, 3, 4, 2), (2, 2, 3, 4, 2)])
@pytest.mark.filterwarnings("ignore:from shapes alone")
def test_every_rank(shape):
    grads, tx = [normal(1, *shape)], agd_jax.agd()
    updates, state = tx.update(grads, tx.init(grads), grads)
    assert_step(updates, grads)
    _, eta, summary = agd_by_hand(grads)
    np.testing.assert_allclose(state, (eta, summary), rtol=1e-5)
    # A vector is a map from the constant 1, whose operator norm moves by eta times its scale.
    if len(shape) < 2:
        d_out = shape[0] if shape else 1
        assert np.linalg.norm(updates[0]) == pytest.approx(eta * np.sqrt(d_out), rel=1e-5)


@pytest.mark.parametrize(
    "before",
    [
        optax.clip_by_global_norm(0.1),
        optax.clip(0.05),
        optax.add_decayed_weights(0.1),
        optax.ema(0.9),
        optax.trace(0.9, nesterov=True),
    ],
    ids=["clip_by_global_norm", "clip", "weight decay", "ema", "trace"],
)
def test_chain_takes_what_comes_before_as_the_gradient(before):
    tx = optax.chain(before, agd_jax.agd())
    state, before_state = tx.init(PARAMS), before.init(PARAMS)
    for seed in (10, 20, 30):
        seen, before_state = before.update(tree(seed), before_state, PARAMS)
        updates, state = tx.update(tree(seed), state, PARAMS)
        assert_step(updates, seen)
    _, eta, _ = agd_by_hand(jax.tree.leaves(seen))
    assert optax.tree.get(state, "eta") == pytest.approx(eta, rel=1e-5)


def test_multi_steps_is_one_large_batch():
    x, y, params = normal(0, 24, 4), normal(1, 24, 8), PARAMS["a"]
    loss = lambda params, x, y: jnp.mean((x @ params["kernel"] - y) ** 2)
    large, _ = agd_jax.agd().update(
        jax.grad(loss)(params, x, y), agd_jax.agd().init(params), params
    )
    tx = optax.MultiSteps(agd_jax.agd(), every_k_schedule=3)
    state = tx.init(params)
    for i in range(3):
        part = slice(8 * i, 8 * i + 8)
        updates, state = tx.update(jax.grad(loss)(params, x[part], y[part]), state, params)
        assert np.any(updates["kernel"] != 0) == (i == 2)
    np.testing.assert_allclose(updates["kernel"], large["kernel"], rtol=1e-5, atol=1e-7)


def test_masked_counts_and_moves_only_its_own():
    mask = {"a": {"kernel": True}, "b": {"kernel": True}, "c": {"bias": False}}
    tx = optax.masked(agd_jax.agd(), mask)
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    assert_step([updates["a"], updates["b"]], [GRADS["a"], GRADS["b"]])
    np.testing.assert_array_equal(updates["c"]["bias"], GRADS["c"]["bias"])


def test_multi_transform_counts_only_its_own():
    labels = {"a": {"kernel": "agd"}, "b": {"kernel": "agd"}, "c": {"bias": "sgd"}}
    tx = optax.multi_transform({"agd": agd_jax.agd(), "sgd": optax.sgd(0.5)}, labels)
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    assert_step([updates["a"], updates["b"]], [GRADS["a"], GRADS["b"]])
    np.testing.assert_allclose(updates["c"]["bias"], -0.5 * GRADS["c"]["bias"])


def test_inject_hyperparams_makes_gain_a_number_of_the_state():
    tx = optax.inject_hyperparams(agd_jax.agd)(gain=2.0)
    state = tx.init(PARAMS)
    update = jax.jit(tx.update)
    updates, state = update(GRADS, state, PARAMS)
    assert_step(updates, GRADS, gain=2.0)
    state.hyperparams["gain"] = jnp.asarray(3.0)
    updates, _ = update(GRADS, state, PARAMS)
    assert_step(updates, GRADS, gain=3.0)


def test_inject_hyperparams_takes_a_schedule_for_gain():
    tx = optax.inject_hyperparams(agd_jax.agd)(gain=optax.linear_schedule(1.0, 0.0, 4))
    state = tx.init(PARAMS)
    for gain in (1.0, 0.75, 0.5):
        updates, state = tx.update(GRADS, state, PARAMS)
        assert_step(updates, GRADS, gain=gain)


def test_apply_if_finite_skips_bad_gradients():
    tx = optax.apply_if_finite(agd_jax.agd(), max_consecutive_errors=3)
    state = tx.init(PARAMS)
    bad = jax.tree.map(lambda g: g.at[(0,) * g.ndim].set(jnp.nan), GRADS)
    updates, state = tx.update(bad, state, PARAMS)
    assert all(np.all(np.asarray(u) == 0) for u in jax.tree.leaves(updates))
    updates, state = tx.update(GRADS, state, PARAMS)
    assert_step(updates, GRADS)
    assert state.total_notfinite == 1


def test_schedule_free():
    # The weights to evaluate are the average of AGD's own iterates, whatever b1 is.
    tx = optax.contrib.schedule_free(agd_jax.agd(), learning_rate=1.0, b1=0.9)
    params, state = PARAMS, tx.init(PARAMS)
    z, iterates = PARAMS, []
    for seed in (10, 20, 30):
        updates, state = tx.update(tree(seed), state, params)
        params = optax.apply_updates(params, updates)
        steps, _, _ = agd_by_hand(jax.tree.leaves(tree(seed)))
        z = jax.tree.map(jnp.add, z, jax.tree.unflatten(jax.tree.structure(z), steps))
        iterates.append(z)
    average = jax.tree.map(lambda *z: sum(z) / len(z), *iterates)
    evaluated = optax.contrib.schedule_free_eval_params(state, params)
    for found, expected in zip(jax.tree.leaves(evaluated), jax.tree.leaves(average), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_lookahead():
    tx = optax.lookahead(agd_jax.agd(), sync_period=2, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(PARAMS)
    state = tx.init(params)
    fast = PARAMS
    for seed in (10, 20):
        updates, state = tx.update(tree(seed), state, params)
        params = optax.apply_updates(params, updates)
        steps, _, _ = agd_by_hand(jax.tree.leaves(tree(seed)))
        fast = jax.tree.map(jnp.add, fast, jax.tree.unflatten(jax.tree.structure(fast), steps))
    halfway = jax.tree.map(lambda slow, fast: (slow + fast) / 2, PARAMS, fast)
    for found, expected in zip(jax.tree.leaves(params.slow), jax.tree.leaves(halfway), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_flatten_is_warned_of_with_what_to_do():
    with pytest.warns(UserWarning, match=r"one bare vector of 184 numbers.*optax\.flatten"):
        optax.flatten(agd_jax.agd()).init(PARAMS)


def test_map_params_finds_no_parameter_in_the_state():
    tx = agd_jax.agd()
    state = tx.init(PARAMS)
    assert optax.tree.map_params(tx, lambda _: "param", state) == state
    named = optax.tree.map_params(
        tx, lambda _: "param", state, transform_non_params=lambda _: "number"
    )
    assert named == agd_jax.AgdState("number", "number")


def test_extra_arguments_are_passed_over():
    tx = optax.chain(agd_jax.agd(), optax.contrib.reduce_on_plateau())
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, value=1.0)
    assert_step(updates, GRADS)
    updates, _ = agd_jax.agd().update(GRADS, agd_jax.agd().init(PARAMS), value=1.0, anything=None)
    assert_step(updates, GRADS)


def test_the_second_step_does_not_compile_again():
    tx = agd_jax.agd()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.copy, PARAMS)
    state = jax.jit(tx.init)(params)
    before = jax.tree.leaves(params)
    for seed in (10, 20, 30):
        params, state = step(params, state, tree(seed))
    assert step._cache_size() == 1
    assert all(leaf.is_deleted() for leaf in before)


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_everything_can_be_donated(name):
    step = jax.jit(step_of(COMPOSITIONS[name]()), donate_argnums=(0, 1))
    params = params_of(name)
    assert_same(name, take_steps(name, params, step), take_steps(name, params_of(name)))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_steps_can_be_scanned(name):
    tx = COMPOSITIONS[name]()
    grads = jax.tree.map(lambda *g: jnp.stack(g), *(tree(10 * i + 10) for i in range(STEPS)))
    step = lambda carry, grads: (step_of(tx)(*carry, grads), None)
    scan = jax.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), grads)[0])
    assert_same(name, scan(params_of(name)), take_steps(name, params_of(name)))


@pytest.mark.parametrize(
    "name", ["agd", *(pytest.param(n, marks=pytest.mark.slow) for n in COMPOSITIONS if n != "agd")]
)
def test_vmap_over_seeds_is_each_seed_by_itself(name):
    trees = [params_of(name, seed) for seed in (0, 5)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    found = jax.jit(jax.vmap(lambda params: take_steps(name, params)))(stacked)
    for i, params in enumerate(trees):
        assert_same(name, jax.tree.map(lambda x, i=i: x[i], found), take_steps(name, params))


@pytest.mark.slow
def test_a_mesh_changes_nothing():
    root = Path(__file__).parents[2]
    env = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.agd_jax.compositions"]
    run = subprocess.run(command, cwd=root, env=os.environ | env, capture_output=True, text=True)
    assert run.stdout.splitlines() == list(COMPOSITIONS), run.stderr


def test_eval_shape_tells_the_shapes_without_numbers():
    tx = agd_jax.agd()
    shapes = jax.eval_shape(lambda: PARAMS)
    state = jax.eval_shape(tx.init, shapes)
    updates, after = jax.eval_shape(tx.update, shapes, state, shapes)
    assert updates == shapes
    assert after == state


# The same two-layer network in three libraries, each trained in its own way.
X, Y = normal(0, 16, 4), normal(1, 16, 2)


def losses_fall(losses):
    return losses[-1] < 0.7 * losses[0] and np.all(np.isfinite(losses))


def wrapped(wrapper):
    """agd(), or MultiSteps around it."""
    return {"agd": agd_jax.agd(), "MultiSteps": optax.MultiSteps(agd_jax.agd(), 1)}[wrapper]


@pytest.mark.parametrize("wrapper", ["agd", "MultiSteps"])
def test_nnx_optimizer(wrapper):
    class Network(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(4, 32, use_bias=False, rngs=rngs)
            self.out = nnx.Linear(32, 2, rngs=rngs)
            self.norm = nnx.BatchNorm(32, rngs=rngs)

        def __call__(self, x):
            return self.out(nnx.relu(self.norm(self.hidden(x))))

    model = Network(nnx.Rngs(0))
    nnx.update(model, agd_jax.orthogonal_init(jax.random.key(0), nnx.state(model, nnx.Param)))
    optimizer = nnx.Optimizer(model, wrapped(wrapper), wrt=nnx.Param)

    @functools.partial(nnx.jit, donate_argnums=(0, 1))
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(X) - Y) ** 2))(model)
        optimizer.update(model, grads)
        return loss, grads

    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    loss, grads = step(model, optimizer)
    moved = jax.tree.map(jnp.subtract, nnx.state(model, nnx.Param), before)
    assert_step(moved, grads, rtol=1e-3)
    assert losses_fall([loss] + [step(model, optimizer)[0] for _ in range(30)])


@pytest.mark.parametrize("wrapper", ["agd", "MultiSteps"])
def test_linen_train_state(wrapper):
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(nn.relu(nn.Dense(32)(x)))

    model = Network()
    params = model.init(jax.random.key(0), X)["params"]
    params = agd_jax.orthogonal_init(jax.random.key(1), params)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=wrapped(wrapper))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state):
        loss = lambda params: jnp.mean((state.apply_fn({"params": params}, X) - Y) ** 2)
        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    losses = []
    for _ in range(30):
        state, loss = step(state)
        losses.append(loss)
    assert losses_fall(losses)


@pytest.mark.parametrize("wrapper", ["agd", "MultiSteps"])
def test_equinox_filter(wrapper):
    model = eqx.nn.MLP(4, 2, 32, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    with pytest.warns(UserWarning, match=r"Of layers\.0\.weight \(32, 4\), "):
        params = agd_jax.orthogonal_init(jax.random.key(1), params)
    tx = wrapped(wrapper)
    with pytest.warns(UserWarning, match=r"layers\.1\.weight \(2, 32\)"):
        state = tx.init(params)

    @functools.partial(eqx.filter_jit, donate="all")
    def step(params, state):
        loss = lambda p: jnp.mean((jax.vmap(eqx.combine(p, static))(X) - Y) ** 2)
        value, grads = eqx.filter_value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return eqx.apply_updates(params, updates), state, value

    losses = []
    for _ in range(30):
        params, state, loss = step(params, state)
        losses.append(loss)
    assert losses_fall(losses)
