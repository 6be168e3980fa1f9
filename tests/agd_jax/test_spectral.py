"""Spectral AGD: orthogonal factors, momentum, and steps in the operator norm."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import agd_jax
from agd_jax.geometry import Layout
from agd_jax.spectral import polar_factor

MOMENTUM = 0.9


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


SHAPES = [(1, 8, 8), (3, 16, 20), (3, 20, 16), (3, 16, 48), (2, 5, 64), (2, 64, 5)]


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_become_about_one_and_vectors_stay(shape):
    x = normal(0, *shape)
    u, s, v = np.linalg.svd(x, full_matrices=False)
    factor = polar_factor(x)
    found = np.einsum("bij,bik,bkl->bjl", u, factor, v.swapaxes(1, 2))
    large = s > 1e-3 * np.linalg.norm(s, axis=1, keepdims=True)
    diagonal = np.diagonal(found, axis1=1, axis2=2)
    np.testing.assert_allclose(diagonal[large], 1, atol=0.15)
    off = found - diagonal[..., None] * np.eye(min(shape[1:]))
    np.testing.assert_allclose(off, 0, atol=2e-3)


@pytest.mark.parametrize("columns", [20, 40])
def test_small_singular_values_are_not_lost(columns):
    u, v = (np.linalg.qr(normal(i, size, 16))[0] for i, size in ((0, 16), (1, columns)))
    s = np.geomspace(1, 3e-3, 16)
    found = u.T @ polar_factor(jnp.asarray((u * s) @ v.T)[None])[0] @ v
    np.testing.assert_allclose(found, np.eye(16), atol=0.15)


def test_a_zero_matrix_has_a_zero_factor():
    assert not polar_factor(jnp.zeros((2, 3, 4))).any()


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_size_of_gradients_does_not_matter_to_directions(scale):
    params = {"kernel": normal(0, 6, 4)}
    tx = agd_jax.agd(norm="spectral", momentum=0.0)
    updates, state = tx.update({"kernel": scale * normal(1, 6, 4)}, tx.init(params), params)
    size = np.linalg.svd(updates["kernel"] / state.eta, compute_uv=False) / (4 / 6) ** 0.5
    np.testing.assert_allclose(size, 1, atol=0.15)


def reference(layouts, gradients):
    """The steps as the equations say them, in numpy and by singular value decompositions."""
    mean = [np.zeros(layout.shape) for layout in layouts]
    for t, grads in enumerate(gradients, 1):
        mean = [MOMENTUM * m + (1 - MOMENTUM) * g for m, g in zip(mean, grads, strict=True)]
        ahead = [
            MOMENTUM * m / (1 - MOMENTUM ** (t + 1)) + (1 - MOMENTUM) * g / (1 - MOMENTUM**t)
            for m, g in zip(mean, grads, strict=True)
        ]
        summary, directions = 0, []
        for layout, m in zip(layouts, ahead, strict=True):
            taps = m.reshape(-1, *m.shape[-2:]) if m.ndim > 1 else m[None, None]
            summary += layout.scale * sum(map(np.linalg.norm, taps)) / len(layouts)
            u, _, v = np.linalg.svd(taps.reshape(-1, m.shape[-1]), full_matrices=False)
            directions.append(layout.scale * len(taps) ** 0.5 * (u @ v).reshape(m.shape))
        eta = np.log((1 + np.sqrt(1 + 4 * summary)) / 2)
        yield [-eta / len(layouts) * d for d in directions], eta


def test_steps_are_those_of_the_equations():
    shapes = [(6, 4), (4, 6), (3, 3, 8, 5), (5,), (1, 7)]
    layouts = [Layout.of_shape(shape) for shape in shapes]
    gradients = [[normal(10 * t + i, *s) for i, s in enumerate(shapes)] for t in range(4)]
    params = [jnp.zeros(shape) for shape in shapes]
    tx = agd_jax.agd(norm="spectral")
    state, update = tx.init(params), jax.jit(tx.update)
    as_numpy = [[np.asarray(g, np.float64) for g in grads] for grads in gradients]
    for grads, (expected, eta) in zip(gradients, reference(layouts, as_numpy), strict=True):
        updates, state = update(grads, state, params)
        np.testing.assert_allclose(optax.tree.get(state, "eta"), eta, rtol=1e-5)
        for found, exact in zip(updates, expected, strict=True):
            # Singular values are one but for 0.13; those of vectors are exact.
            tolerance = 1e-5 if min(exact.shape[-2:]) == 1 or exact.ndim == 1 else 0.13
            error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
            assert error < tolerance


@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
def test_layers_in_one_array_step_as_they_do_alone(norm):
    def apart(params, x):
        for kernel in params:
            x = jnp.tanh(x @ kernel)
        return x

    def stacked(kernels, x):
        return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0]

    kernels, x = normal(0, 3, 8, 8), normal(1, 4, 8)
    grads, found = normal(2, 3, 8, 8), []
    for apply, params, of in (
        (apart, list(kernels), list(grads)),
        (stacked, kernels, grads),
    ):
        geometry = agd_jax.geometry_of(apply, params, x)
        tx = agd_jax.agd(geometry=geometry, norm=norm, momentum=0.9)
        updates, _ = tx.update(of, tx.init(params), params)
        found.append(jnp.stack(list(updates)))
    # What a small singular value becomes depends on rounding more.
    np.testing.assert_allclose(*found, atol=1e-4 if norm == "spectral" else 1e-7)


def test_rows_that_are_not_looked_up_stay_whatever_their_momentum():
    def apply(params, tokens):
        return params["table"][tokens] @ params["out"]

    params = {"table": normal(0, 5, 8), "out": normal(1, 8, 3)}

    def grads(tokens):
        return jax.grad(lambda p: jnp.sum(apply(p, tokens) ** 2))(params)

    geometry = agd_jax.geometry_of(apply, params, jnp.array([0, 1]))
    tx = agd_jax.agd(geometry=geometry, norm="spectral")
    state = tx.init(params)
    _, state = tx.update(grads(jnp.array([0, 1])), state, params)
    updates, state = tx.update(grads(jnp.array([1, 2])), state, params)
    moved = np.any(np.asarray(updates["table"]) != 0, axis=1)
    assert moved.tolist() == [False, True, True, False, False]
    # Each by a root mean square of one layer's part of eta.
    size = np.sqrt(np.mean(np.square(updates["table"][1:3]), axis=1))
    np.testing.assert_allclose(size, optax.tree.get(state, "eta") / geometry.depth, rtol=1e-5)


def test_the_state_has_one_tensor_for_each_parameter():
    params = {"kernel": jnp.ones((3, 2), jnp.bfloat16), "bias": jnp.ones(2)}
    frobenius = agd_jax.agd().init(params)
    assert len(jax.tree.leaves(frobenius)) == 2
    mean = optax.tree.get(agd_jax.agd(norm="spectral").init(params), "mean")
    assert jax.tree.map(jnp.shape, mean) == jax.tree.map(jnp.shape, params)
    # A small part of a gradient would be lost in what bfloat16 has room for.
    assert {leaf.dtype for leaf in jax.tree.leaves(mean)} == {np.dtype("float32")}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"norm": "operator"}, r"agd\(norm='operator'\): choose 'frobenius' or 'spectral'"),
        ({"momentum": 1.0}, r"momentum must be at least 0 and less than 1"),
        ({"momentum": -0.1}, r"momentum must be at least 0 and less than 1"),
        ({"momentum": float("nan")}, r"momentum must be at least 0 and less than 1"),
    ],
)
def test_what_makes_no_sense_is_refused(argument, message):
    with pytest.raises(ValueError, match=message):
        agd_jax.agd(**argument)


ON_A_MESH = """
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import agd_jax

shapes = {"conv": (3, 3, 8, 16), "heads": (16, 4, 8), "last": (32, 12), "table": (24, 8)}
shapes |= {f"dense{i}": (32, 32) for i in range(16)} | {"bias": (8,)}
draw = lambda i, shape: jax.random.normal(jax.random.key(i), shape, jnp.float64)
grads = {name: draw(i, shape) for i, (name, shape) in enumerate(shapes.items())}


def apply(params, image, x, row):
    dense = sum(x @ params[f"dense{i}"] for i in range(16))
    window = dict(window_strides=(1, 1), padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    conv = jax.lax.conv_general_dilated(image, params["conv"], **window)
    heads = jnp.einsum("bi,ihd->bhd", x[:, :16], params["heads"])
    table = params["table"][row] + params["bias"]
    return dense @ params["last"], conv, heads, table


inputs = jnp.zeros((1, 4, 4, 8)), jnp.zeros((2, 32)), jnp.zeros(3, int)
tx = agd_jax.agd(geometry=agd_jax.geometry_of(apply, grads, *inputs), norm="spectral")


def update(grads):
    # The updates, and the operations of each device.
    state = tx.init(grads)
    program = jax.jit(tx.update).lower(grads, state).compile()
    return program(grads, state)[0], program.cost_analysis()["flops"]


expected, alone = update(grads)
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((4, 2), ("data", "model"), (kind, kind))
    for spec in (P(), P("data"), P("model", "data")):
        # Of the last axes, where there are as many.
        of = lambda x: P(*[None] * (x.ndim - len(spec)), *spec) if x.ndim >= len(spec) else P()
        shardings = jax.tree.map(lambda x: NamedSharding(mesh, of(x)), grads)
        with jax.set_mesh(mesh):
            updates, each = update(jax.device_put(grads, shardings))
        for name in grads:
            np.testing.assert_allclose(updates[name], expected[name], rtol=1e-9, atol=1e-12)
        assert each < alone / 4, (kind, spec, each, alone)
print("same on", len(jax.devices()))
"""


@pytest.mark.slow
def test_devices_of_a_mesh_share_out_the_matrices_however_these_are_split():
    env = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    env |= {"JAX_ENABLE_X64": "true", "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}
    command = [sys.executable, "-c", ON_A_MESH]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.stdout == "same on 8\n", run.stderr
