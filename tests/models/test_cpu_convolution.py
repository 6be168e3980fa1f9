"""Each form of a convolution and of its gradients, against XLA's own."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from models import cpu_convolution
from models.cpu_convolution import FORMS, Window, convolve, form_of

# (height, width), kernel, stride, padding
SHAPES = [
    ((8, 8), 3, 1, 1),
    ((5, 7), 3, 1, 1),
    ((4, 3), 3, 1, 0),
    ((3, 6), 3, 1, 2),
    ((2, 2), 3, 1, 1),
    ((1, 1), 3, 1, 1),
    ((8, 8), 3, 2, 1),
    ((7, 5), 3, 2, 1),
    ((2, 2), 3, 2, 1),
    ((1, 2), 3, 2, 1),
    ((9, 6), 7, 2, 3),
    ((3, 2), 7, 2, 3),
    ((4, 5), 1, 1, 0),
    ((4, 5), 1, 2, 0),
    ((5, 5), 1, 2, 0),
    ((6, 6), 3, 3, 0),
    ((5, 4), 2, 3, 1),
]


def fits(form, kernel, stride):
    return form != "winograd" or (kernel, stride) == (3, 1)


def operands(map_size, kernel, window, dtype, channels=(3, 5), batch=2):
    """An input, a kernel and a gradient of the output."""
    rng = np.random.default_rng(0)
    out = [window.size(n, kernel) for n in map_size]
    shapes = (
        (batch, *map_size, channels[0]),
        (kernel, kernel, *channels),
        (batch, *out, channels[1]),
    )
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def every_form(map_size, kernel, stride, window, *, x, k, dy):
    """Yields (what, form, result)."""
    for what, form in itertools.product(FORMS, FORMS["output"]):
        if fits(form, kernel, stride):
            given = (x, k) if what == "output" else (x, k, dy)
            yield what, form, FORMS[what][form](*given, window)


@pytest.mark.parametrize(("map_size", "kernel", "stride", "padding"), SHAPES)
def test_every_form_is_the_same_convolution(map_size, kernel, stride, padding):
    window = Window(stride, padding)
    with jax.enable_x64(True):
        x, k, dy = operands(map_size, kernel, window, jnp.float64)
        results = jax.jit(
            lambda x, k, dy: {
                (what, form): result
                for what, form, result in every_form(
                    map_size, kernel, stride, window, x=x, k=k, dy=dy
                )
            }
        )(x, k, dy)
    assert len(results) == (9 if fits("winograd", kernel, stride) else 6)
    for (what, form), result in results.items():
        np.testing.assert_allclose(
            result, results[what, "native"], rtol=1e-12, atol=1e-12, err_msg=f"{what}, {form}"
        )


@pytest.mark.slow
@pytest.mark.parametrize("map_size", [(16, 16), (4, 4), (2, 2)])
def test_every_form_is_accurate_in_float32(map_size):
    window = Window(1, 1)
    single = operands(map_size, 3, window, jnp.float32, channels=(64, 64), batch=16)
    with jax.enable_x64(True):
        x, k, dy = (a.astype(jnp.float64) for a in single)
        exact = {
            what: np.asarray(form["native"](*((x, k) if what == "output" else (x, k, dy)), window))
            for what, form in FORMS.items()
        }
    x, k, dy = single
    for what, form, result in every_form(map_size, 3, 1, window, x=x, k=k, dy=dy):
        assert result.dtype == jnp.float32
        error = np.max(np.abs(np.asarray(result) - exact[what])) / np.max(np.abs(exact[what]))
        assert error < 5e-6, (what, form)


def ours(window):
    padding = ((window.padding,) * 2,) * 2
    return lambda x, k: convolve(x, k, (window.stride,) * 2, padding)


def native(window):
    return lambda x, k: cpu_convolution.native_output(x, k, window)


def with_gradients(function):
    def both(x, k, dy):
        y, gradients = jax.vjp(function, x, k)
        return y, gradients(dy)

    return both


CHOSEN = [((8, 8), 3, 1, 1), ((2, 2), 3, 1, 1), ((9, 9), 3, 2, 1), ((8, 8), 1, 2, 0)]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("map_size", "kernel", "stride", "padding"), CHOSEN)
def test_the_chosen_forms_have_the_gradients_and_dtype_of_the_native(
    map_size, kernel, stride, padding, dtype
):
    window = Window(stride, padding)
    given = operands(map_size, kernel, window, dtype, channels=(16, 32))
    found = jax.jit(with_gradients(ours(window)))(*given)
    expected = jax.jit(with_gradients(native(window)))(*given)
    tolerance = 1e-5 if dtype == jnp.float32 else 0.05
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == dtype
        scale = np.max(np.abs(b.astype(jnp.float32)))
        np.testing.assert_allclose(
            a.astype(jnp.float32), b.astype(jnp.float32), atol=tolerance * scale
        )


def test_it_can_be_mapped_over_networks():
    window = Window(1, 1)
    x, k, dy = operands((6, 6), 3, window, jnp.float32, channels=(16, 16), batch=6)
    x, k, dy = x.reshape(3, 2, 6, 6, 16), jnp.stack([k, 2 * k, -k]), dy.reshape(3, 2, 6, 6, 16)
    mapped = jax.jit(jax.vmap(with_gradients(ours(window))))(x, k, dy)
    for i in range(3):
        alone = with_gradients(native(window))(x[i], k[i], dy[i])
        for a, b in zip(jax.tree.leaves(mapped), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 1)])
def test_the_gradients_of_mapped_convolutions_are_those_of_the_native(axes):
    window = Window(1, 1)

    def gradients(function):
        mapped = jax.vmap(jax.vmap(function, axes), axes)
        return jax.jit(jax.grad(lambda x, k: jnp.sum(jnp.sin(mapped(x, k))), (0, 1)))

    def repeat(a, axis):
        for weights in [] if axis is None else ([1, 2, -1], [1, 3]):
            a = jnp.stack([weight * a for weight in weights], axis)
        return a

    with jax.enable_x64(True):
        x, k, _ = operands((4, 4), 3, window, jnp.float64, channels=(16, 16))
        x, k = repeat(x, axes[0]), repeat(k, axes[1])
        found, expected = (gradients(f(window))(x, k) for f in (ours, native))
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


def forward_and_second(function):
    """Both kinds of forward derivatives, and the derivative of a gradient."""

    def every(x, k, dx, dk):
        linear = jax.linearize(function, x, k)
        gradient = jax.grad(lambda x, k: jnp.sum(jnp.sin(function(x, k))), (0, 1))
        return (
            jax.jvp(function, (x, k), (dx, dk)),
            jax.jvp(lambda k: function(x, k), (k,), (dk,)),
            (linear[0], linear[1](dx, dk)),
            jax.jvp(gradient, (x, k), (dx, dk)),
        )

    return jax.jit(every)


@pytest.mark.parametrize(
    ("map_size", "kernel", "stride", "padding", "form"),
    [
        (*shape, form)
        for shape, form in itertools.product(SHAPES[1:9:2], FORMS["output"])
        if fits(form, *shape[1:3])
    ],
)
def test_every_form_has_the_forward_derivatives_of_the_native(
    map_size, kernel, stride, padding, form, monkeypatch
):
    monkeypatch.setattr(cpu_convolution, "form_of", lambda *_: form)
    window = Window(stride, padding)
    with jax.enable_x64(True):
        x, k, _ = operands(map_size, kernel, window, jnp.float64)
        given = x, k, jnp.cos(3 * x), jnp.cos(3 * k)
        found = forward_and_second(ours(window))(*given)
        expected = forward_and_second(native(window))(*given)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert a.dtype == jnp.float64
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["resnet18", "vgg11"])
def test_networks_have_the_forward_derivatives_of_the_native(arch, monkeypatch):
    types = {"dtype": jnp.float64, "param_dtype": jnp.float64}
    make = lambda: models.create(arch, (8, 8, 1), 10, rngs=nnx.Rngs(0), **types)
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        graphdef, *shapes = nnx.split(nnx.eval_shape(make), nnx.Param, ...)
        draw = lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape))
        params, change, averages = (jax.tree.map(draw, shapes[i]) for i in (0, 0, 1))
        images = jnp.asarray(rng.standard_normal((4, 8, 8, 1)))
        network = lambda params: nnx.merge(graphdef, params, averages, copy=True)(images)
        forward = lambda params, change: jax.jvp(network, (params,), (change,))
        found = jax.jit(lambda *given: forward(*given))(params, change)
        monkeypatch.setattr(cpu_convolution, "form_of", lambda *_: "native")
        expected = jax.jit(lambda *given: forward(*given))(params, change)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9 * np.max(np.abs(b)))


def operations(function, given, platform):
    """Counts of the operations that a program for a platform has, but for the choice of a form."""
    lowered = jax.jit(function).trace(*given).lower(lowering_platforms=(platform,))
    found = re.findall(r"stablehlo\.[a-z_]+.*?$", lowered.as_text(), re.MULTILINE)
    # Operands have other numbers, and a choice of one is written as a `case`.
    plain = (re.sub(r"%\w+|\(\s*%.*?\)(?= dim)", "", line) for line in found)
    skipped = ("stablehlo.case", "stablehlo.return", "stablehlo.constant")
    return sorted(line for line in plain if not line.startswith(skipped))


@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu"])
@pytest.mark.parametrize(("map_size", "kernel", "stride", "padding"), CHOSEN)
def test_accelerators_are_given_the_native_convolution(map_size, kernel, stride, padding, platform):
    window = Window(stride, padding)
    given = operands(map_size, kernel, window, jnp.float32, channels=(16, 32))
    found = operations(with_gradients(ours(window)), given, platform)
    expected = operations(with_gradients(native(window)), given, platform)
    assert sum("convolution" in line for line in expected) == 3
    assert found == expected
    # There is something to tell apart.
    assert operations(with_gradients(ours(window)), given, "cpu") != expected


def test_images_are_left_to_the_native_form():
    for what in FORMS:
        assert form_of(what, (32, 32), (3, 3, 3, 64), Window(1, 1)) == "native"
        assert form_of(what, (224, 224), (7, 7, 3, 64), Window(2, 3)) == "native"
