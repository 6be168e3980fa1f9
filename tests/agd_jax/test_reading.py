"""What the program says of its parameters, in any framework and however it is written."""

import functools
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

import agd_jax
from agd_jax.geometry import VECTOR_MASS

D, HEADS, TOKENS = 8, 2, 5


def rows(geometry):
    """Kind, inputs, outputs, taps, layers and scale, of mass 1, of each parameter, by its path."""
    return {
        path: (one.kind, *map(one.count, ("inputs", "outputs", "taps", "layers")), one.scale)
        for path, one in geometry.with_mass(1.0).layouts.items()
    }


def read(apply, params, *inputs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return rows(agd_jax.geometry_of(apply, params, *inputs))


def zeros(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


X = zeros(4, D)


@pytest.mark.parametrize(
    ("apply", "shape", "expected"),
    [
        (lambda p, x: x @ p, (D, 3), ("matrix", D, 3, 1, 1, (3 / D) ** 0.5)),
        (lambda p, x: x @ p.T, (3, D), ("matrix", D, 3, 1, 1, (3 / D) ** 0.5)),
        (lambda p, x: (p @ x.T).T, (3, D), ("matrix", D, 3, 1, 1, (3 / D) ** 0.5)),
        # Heads split or joined, before or after.
        (
            lambda p, x: jnp.einsum("bd,dhk->bhk", x, p),
            (D, 2, 3),
            ("matrix", D, 6, 1, 1, 0.75**0.5),
        ),
        (lambda p, x: x @ p.reshape(D, 6), (D, 2, 3), ("matrix", D, 6, 1, 1, 0.75**0.5)),
        (
            lambda p, x: jnp.einsum("bhk,hkd->bd", x.reshape(4, 2, 4), p),
            (2, 4, 6),
            ("matrix", 8, 6, 1, 1, 0.75**0.5),
        ),
        # An axis of which one part is contracted and one goes along.
        (
            lambda p, x: jnp.einsum("bhk,hkd->bhd", x.reshape(4, 2, 4), p.reshape(2, 4, 6)),
            (D, 6),
            ("matrix", 4, 6, 1, 2, 1.5**0.5),
        ),
        # Casts, constants and statistics of the parameter itself change nothing.
        (lambda p, x: x @ (0.5 * p).astype(jnp.bfloat16), (D, 2), ("matrix", D, 2, 1, 1, 0.5)),
        (lambda p, x: x @ ((p - p.mean()) / p.std()), (D, 2), ("matrix", D, 2, 1, 1, 0.5)),
        (
            lambda p, x: jax.jit(jax.checkpoint(jnp.matmul))(x, p),
            (D, 2),
            ("matrix", D, 2, 1, 1, 0.5),
        ),
        (
            lambda p, x: jax.lax.cond(x[0, 0] > 0, lambda: x @ p, lambda: -x @ p),
            (D, 2),
            ("matrix", D, 2, 1, 1, 0.5),
        ),
        # Layers: scanned over, indexed in Python, gone over by a loop, mapped over.
        (
            lambda p, x: jax.lax.scan(lambda x, w: (x @ w, None), x, p)[0],
            (6, D, D),
            ("matrix", D, D, 1, 6, 1),
        ),
        (lambda p, x: x @ p[0] @ p[1], (2, D, D), ("matrix", D, D, 1, 2, 1)),
        (
            lambda p, x: jax.lax.fori_loop(0, 6, lambda i, x: x @ p[i], x),
            (6, D, D),
            ("matrix", D, D, 1, 6, 1),
        ),
        (lambda p, x: jax.vmap(jnp.matmul)(x, p), (4, D, 2), ("matrix", D, 2, 1, 4, 0.5)),
        # But over one input they are outputs side by side.
        (lambda p, x: jax.vmap(lambda w: x @ w)(p), (4, D, 2), ("matrix", D, 8, 1, 1, 1)),
        # Queries, keys and values in one parameter are three matrices.
        (
            lambda p, x: jnp.stack([x @ w for w in jnp.split(p, 3, axis=1)]),
            (D, 3 * D),
            ("matrix", D, D, 1, 3, 1),
        ),
        # Steps of a recurrence are one use.
        (
            lambda p, x: jax.lax.scan(lambda h, x: (jnp.tanh(h @ p + x), None), x[0], x)[0],
            (D, D),
            ("matrix", D, D, 1, 1, 1),
        ),
        (lambda p, x: x + p, (D,), ("offset", 1, D, 1, 1, D**0.5)),
        (lambda p, x: x.reshape(4, 2, 4) - p, (2, 4), ("offset", 1, D, 1, 1, D**0.5)),
        (lambda p, x: jnp.concatenate([p, x]), (1, D), ("offset", 1, D, 1, 1, D**0.5)),
        (lambda p, x: jnp.where(x > 0, x, p), (D,), ("offset", 1, D, 1, 1, D**0.5)),
        # Of a table that is longer than what is shown, what is seen is all there is.
        (lambda p, x: x + p[:4], (16, D), ("offset", 1, 16 * D, 1, 1, (16 * D) ** 0.5)),
        (
            lambda p, x: jax.lax.scan(lambda h, x: (h + x, None), p, x)[0],
            (D,),
            ("offset", 1, D, 1, 1, D**0.5),
        ),
        (lambda p, x: x * p, (D,), ("scale", 1, D, 1, 1, D**0.5)),
        (lambda p, x: x * (1 + p), (D,), ("scale", 1, D, 1, 1, D**0.5)),
        (lambda p, x: x / p, (), ("scale", 1, 1, 1, 1, 1)),
        (lambda p, x: p[x[0].astype(int)], (9, D), ("lookup", 1, D, 1, 1, D**0.5)),
        (lambda p, x: p[x[0, 0].astype(int)], (9, D), ("lookup", 1, D, 1, 1, D**0.5)),
        (
            lambda p, x: jnp.take(p, jnp.arange(4), axis=0) + x,
            (9, D),
            ("lookup", 1, D, 1, 1, D**0.5),
        ),
        # A tied embedding takes the smaller of its two steps.
        (
            lambda p, x: p[x[0].astype(int)] @ p.T,
            (18, D),
            ("matrix", D, 18, 1, 1, 1.5),
        ),
    ],
)
def test_a_parameter_is_seen_as_it_is_used(apply, shape, expected):
    (found,) = read(lambda p, x: apply(p["p"], x), {"p": zeros(*shape)}, X).values()
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("spatial", "groups", "expected"),
    [
        (1, 1, ("convolution", 8, 16, 3, 1, (2 / 3) ** 0.5)),
        (2, 1, ("convolution", 8, 16, 9, 1, 2**0.5 / 3)),
        (3, 1, ("convolution", 8, 16, 27, 1, (2 / 27) ** 0.5)),
        (2, 4, ("convolution", 2, 4, 9, 1, 2**0.5 / 3)),
        (2, 8, ("convolution", 1, 2, 9, 1, 2**0.5 / 3)),
    ],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions(spatial, groups, expected, transposed):
    if transposed and groups > 1:
        pytest.skip("Flax has none")
    kernel = (3,) * spatial
    if transposed:
        layer = nn.ConvTranspose(16, kernel, use_bias=False)
    else:
        layer = nn.Conv(16, kernel, feature_group_count=groups, use_bias=False)
    x = zeros(2, *(6,) * spatial, 8)
    params = jax.eval_shape(layer.init, jax.random.key(0), x)
    (found,) = read(layer.apply, params, x).values()
    assert found == pytest.approx(expected)


def test_groups_are_matrices_of_their_own():
    """A grouped convolution takes the steps of as many convolutions side by side."""
    joined = nn.Conv(6, (3, 3), feature_group_count=2, use_bias=False)
    x = jax.random.normal(jax.random.key(0), (2, 5, 5, 4))
    params = joined.init(jax.random.key(1), x)
    layout = agd_jax.geometry_of(joined.apply, params, x).layouts["params.kernel"]
    kernel = params["params"]["kernel"]
    direction = layout.direction(kernel, layout.norms(kernel))
    alone = agd_jax.geometry.Layout.of_shape((3, 3, 2, 3))
    for part, expected in zip(
        jnp.split(direction, 2, axis=3), jnp.split(kernel, 2, axis=3), strict=True
    ):
        expected = alone.direction(expected, alone.norms(expected))
        np.testing.assert_allclose(part, expected, rtol=1e-5)


def test_what_cannot_be_followed_is_named_and_can_be_said_by_hand():
    params = {"a": zeros(D, 3), "b": zeros(3, 3), "gone": zeros(2)}
    apply = lambda p, x: x @ jnp.exp(p["a"]) @ (p["b"] @ p["b"])
    with pytest.warns(UserWarning, match="cannot be read from the program") as caught:
        geometry = agd_jax.geometry_of(apply, params, X)
    (warning,) = caught
    message = str(warning.message)
    assert warning.filename == __file__
    assert message.endswith(
        "a (8, 3): exp; b (3, 3): dot_general of two parameters; gone (2,): not used"
    )
    # As without a geometry.
    assert geometry.layouts["a"] == agd_jax.geometry.Layout.of_shape((D, 3))
    by_hand = {"a": MuonDimensionNumbers(1, 0), "b": MuonDimensionNumbers((-1,), ())}
    with pytest.warns(UserWarning, match=r": gone \(2,\): not used$"):
        geometry = agd_jax.geometry_of(apply, params, X, by_hand=by_hand)
    assert rows(geometry)["a"] == pytest.approx(("matrix", 3, D, 1, 1, (8 / 3) ** 0.5))
    assert rows(geometry)["b"] == pytest.approx(("matrix", 3, 1, 1, 3, 3**-0.5))
    with pytest.raises(ValueError, match="by_hand: there is no parameter c"):
        agd_jax.geometry_of(apply, params, X, by_hand={"c": MuonDimensionNumbers()})


def test_a_geometry_of_other_parameters_is_refused():
    geometry = agd_jax.geometry_of(lambda p, x: x @ p["a"], {"a": zeros(D, 2)}, X)
    tx = agd_jax.agd(geometry=geometry)
    with pytest.raises(ValueError, match=r"of a \(8, 3\) it has one of shape \(8, 2\)$"):
        tx.init({"a": jnp.zeros((D, 3))})
    with pytest.raises(ValueError, match=r"of b \(1,\) it has none$"):
        agd_jax.orthogonal_init(jax.random.key(0), {"b": jnp.zeros(1)}, geometry)
    # A part of them is fine, as optax.partition gives it.
    assert tx.init({}) is not None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                y = nn.MultiHeadDotProductAttention(HEADS)(nn.LayerNorm()(x))
                return x + y + nn.Dense(D)(nn.gelu(nn.Dense(2 * D)(nn.LayerNorm()(x)))), None

        embed = nn.Embed(17, D)
        stack = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = stack()(embed(tokens), None)
        return embed.attend(x)


def test_a_transformer_in_linen_with_a_scan_over_layers_and_a_tied_embedding():
    model, tokens = Scanned(), jax.ShapeDtypeStruct((2, TOKENS), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    found = read(model.apply, params, tokens)
    layer = "params.ScanLayer_0."
    attention = layer + "MultiHeadDotProductAttention_0."
    assert found["params.Embed_0.embedding"] == pytest.approx(
        ("matrix", D, 17, 1, 1, (17 / D) ** 0.5)
    )
    for name in ("query", "key", "value", "out"):
        assert found[f"{attention}{name}.kernel"] == ("matrix", D, D, 1, 3, 1)
        assert found[f"{attention}{name}.bias"] == pytest.approx(("offset", 1, D, 1, 3, D**0.5))
    assert found[layer + "LayerNorm_0.scale"] == pytest.approx(("scale", 1, D, 1, 3, D**0.5))
    assert found[layer + "Dense_1.kernel"] == pytest.approx(("matrix", D, 2 * D, 1, 3, 2**0.5))


@functools.cache
def scanned():
    """Parameters of ``Scanned``, and how it uses them."""
    model, tokens = Scanned(), jnp.zeros((2, TOKENS), int)
    params = jax.jit(model.init)(jax.random.key(0), tokens)
    return params, agd_jax.geometry_of(model.apply, params, tokens)


def test_the_table_and_muons_numbers():
    params, geometry = scanned()
    heading, first, *_ = str(geometry).splitlines()
    assert " ".join(heading.split()) == "path shape kind inputs outputs taps layers scale"
    assert " ".join(first.split()) == "params.Embed_0.embedding (17, 8) matrix 8 17 1 1 1.458"
    numbers = geometry.muon_dimension_numbers()["params"]
    assert geometry.muon_dimension_numbers(params)["params"] == numbers
    assert numbers["Embed_0"]["embedding"] == MuonDimensionNumbers((1,), (0,))
    attention = numbers["ScanLayer_0"]["MultiHeadDotProductAttention_0"]
    assert attention["query"]["kernel"] == MuonDimensionNumbers((1,), (2, 3))
    assert attention["out"]["kernel"] == MuonDimensionNumbers((1, 2), (3,))
    assert attention["out"]["bias"] is None
    tx = optax.contrib.muon(0.1, muon_weight_dimension_numbers=geometry.muon_dimension_numbers)
    updates, _ = tx.update(params, tx.init(params), params)
    kernel = updates["params"]["ScanLayer_0"]["MultiHeadDotProductAttention_0"]["query"]["kernel"]
    singular = jnp.linalg.svd(kernel.reshape(3, D, D), compute_uv=False)
    assert singular.max() / singular.min() < 2


def test_starting_weights_of_every_kind():
    params, geometry = scanned()
    params = jax.tree.map(lambda p: p + 7, params)
    start = agd_jax.orthogonal_init(jax.random.key(1), params, geometry)["params"]
    layer = start["ScanLayer_0"]
    attention = layer["MultiHeadDotProductAttention_0"]
    kernel = attention["query"]["kernel"].reshape(3, D, D)
    eye = np.broadcast_to(np.eye(D), (3, D, D))
    np.testing.assert_allclose(kernel @ kernel.swapaxes(1, 2), eye, atol=1e-5)
    assert not np.any(attention["query"]["bias"])
    assert np.all(layer["LayerNorm_0"]["scale"] == 1)
    table = {"t": jnp.zeros((9, D))}
    geometry = agd_jax.geometry_of(lambda p, i: p["t"][i], table, jnp.zeros(3, int))
    drawn = agd_jax.orthogonal_init(jax.random.key(1), table, geometry)["t"]
    np.testing.assert_allclose(np.linalg.norm(drawn, axis=1), D**0.5, rtol=1e-5)


def test_a_row_that_is_not_looked_up_does_not_move():
    table = {"t": jax.random.normal(jax.random.key(0), (9, D))}
    loss = lambda p, i: jnp.sum(jnp.sin(p["t"][i]))
    index = jnp.array([2, 5, 5])
    tx = agd_jax.agd(geometry=agd_jax.geometry_of(loss, table, index))
    updates, state = tx.update(jax.grad(loss)(table, index), tx.init(table), table)
    sizes = np.linalg.norm(updates["t"], axis=1)
    assert set(np.flatnonzero(sizes)) == {2, 5}
    np.testing.assert_allclose(sizes[[2, 5]], D**0.5 * state.eta, rtol=1e-5)


def test_layers_take_the_steps_they_would_take_listed():
    w = jax.random.normal(jax.random.key(0), (4, D, D)) / D**0.5
    x = jax.random.normal(jax.random.key(1), (6, D))
    stacked = lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]

    def listed(p, x):
        for v in p:
            x = jnp.tanh(x @ v)
        return x

    steps = []
    for apply, params in ((stacked, {"w": w}), (listed, list(w))):
        tx = agd_jax.agd(geometry=agd_jax.geometry_of(apply, params, x))
        grads = jax.grad(lambda p, apply=apply: jnp.sum(apply(p, x) ** 2))(params)
        updates, state = tx.update(grads, tx.init(params), params)
        steps.append((jnp.stack(jax.tree.leaves(updates)).reshape(w.shape), state.eta))
    np.testing.assert_allclose(*(updates for updates, _ in steps), rtol=1e-4)
    np.testing.assert_allclose(*(eta for _, eta in steps), rtol=1e-6)


def block(x, w):
    return x + jnp.tanh(x @ w)


@pytest.mark.parametrize(
    ("apply", "shape", "depth"),
    [
        # A chain is as deep as it has tensors, scanned over or listed.
        (lambda p, x: x @ p[0] @ p[1] @ p[2], (3, D, D), 3),
        (lambda p, x: jax.lax.scan(lambda x, w: (x @ w, None), x, p)[0], (5, D, D), 5),
        (lambda p, x: jax.nn.standardize(x @ p[0] + p[1, 0]) * p[2, 0], (3, D, D), 3),
        # A sum has the mean depth of its terms: of 0 and 1, of 0, 1 and 1.5, and so on.
        (lambda p, x: block(x, p[0]), (1, D, D), 0.5),
        (lambda p, x: block(block(x, p[0]), p[1]), (2, D, D), 0.5 * (0.5 + 1.5) - 1 / 6),
        (lambda p, x: jax.lax.scan(lambda x, w: (block(x, w), None), x, p)[0], (2, D, D), 5 / 6),
        # A recurrence uses the same layer again.
        (
            lambda p, x: jax.lax.scan(lambda h, x: (jnp.tanh(h @ p), None), x[0], x)[0],
            (D, D),
            1,
        ),
        # Of branches that are joined, not added, all count.
        (lambda p, x: jnp.concatenate([x, x @ p[0] @ p[1]], axis=1), (2, D, D), 2),
        # What both terms of a sum depend on counts once; an offset is no term, a table is.
        (lambda p, x: (lambda h: h + jnp.tanh(h @ p[1]))(x @ p[0]), (2, D, D), 1.5),
        (lambda p, x: block(x + p[0, 0], p[1]), (2, D, D), 1.5),
        (lambda p, x: x @ p[0] + p[1][jnp.arange(4)], (2, D, D), 1),
    ],
)
def test_effective_depth(apply, shape, depth):
    found = agd_jax.reading.read(lambda p, x: apply(p["p"], x), {"p": zeros(*shape)}, X)
    assert sum(found.influence) == pytest.approx(depth)


def test_offsets_and_scales_have_a_mass_which_shares_out_the_step():
    def apply(params, x):
        return jnp.tanh(x @ params["kernel"] + params["bias"]) * params["scale"]

    shapes = {"kernel": (D, D), "bias": (D,), "scale": (D,)}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    x = jax.random.normal(jax.random.key(1), (4, D))
    geometry = agd_jax.geometry_of(apply, params, x)
    assert geometry.depth == pytest.approx(1 + 2 * VECTOR_MASS)
    assert geometry.with_mass(1.0).depth == 3
    assert geometry.layouts["bias"].scale == pytest.approx(VECTOR_MASS * D**0.5)
    assert geometry.by_tensors().depth is None
    grads = jax.grad(lambda p: jnp.sum(apply(p, x) ** 2))(params)
    norms = {name: float(jnp.linalg.norm(g)) for name, g in grads.items()}
    for norm in ("frobenius", "spectral"):
        tx = agd_jax.agd(geometry=geometry, norm=norm)
        updates, state = tx.update(grads, tx.init(params), params)
        vectors = VECTOR_MASS * D**0.5
        size = float(optax.tree.get(state, "eta")) / geometry.depth
        for name in ("bias", "scale"):
            assert float(jnp.linalg.norm(updates[name])) == pytest.approx(vectors * size, rel=1e-4)
        if norm == "frobenius":
            assert float(jnp.linalg.norm(updates["kernel"])) == pytest.approx(size, rel=1e-4)
            total = norms["kernel"] + vectors * (norms["bias"] + norms["scale"])
            summary = optax.tree.get(state, "gradient_summary")
            assert summary == pytest.approx(total / geometry.depth, rel=1e-4)
    # Where there are no others, offsets and scales take the whole step.
    alone = agd_jax.geometry_of(lambda p, x: x * p, jnp.ones(D), x)
    (scale,) = alone.layouts.values()
    assert scale.scale / alone.depth == pytest.approx(D**0.5)
    assert agd_jax.geometry_of(lambda p, x: x, {}, x).depth == 0
    # As in the paper, with tensors that count alike, and as without a geometry.
    alike, shapes_alone = (
        tx.update(grads, tx.init(params), params)[0]
        for tx in (agd_jax.agd(geometry=geometry.by_tensors()), agd_jax.agd())
    )
    assert all(map(np.array_equal, jax.tree.leaves(alike), jax.tree.leaves(shapes_alone)))


@pytest.mark.parametrize("depth", ["effective", None])
def test_the_step_is_shared_out_by_the_effective_depth(depth):
    apply = lambda p, x: block(block(x, p[0]), p[1])
    params = list(jax.random.normal(jax.random.key(0), (2, D, D)))
    x = jax.random.normal(jax.random.key(1), (4, D))
    geometry = agd_jax.geometry_of(apply, params, x)
    if depth is None:
        geometry = geometry.by_tensors()
    share = 5 / 6 if depth else 2
    grads = jax.grad(lambda p: jnp.sum(apply(p, x) ** 2))(params)
    tx = agd_jax.agd(geometry=geometry)
    updates, state = tx.update(grads, tx.init(params), params)
    total = sum(float(jnp.linalg.norm(g)) for g in grads)
    assert float(state.gradient_summary) == pytest.approx(total / max(share, 1), rel=1e-5)
    for update in updates:
        expected = float(state.eta) / max(share, 1)
        assert float(jnp.linalg.norm(update)) == pytest.approx(expected, rel=1e-5)
