import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agd_jax.geometry import Layout

SHAPES = st.lists(st.integers(0, 9), max_size=6).map(tuple)
SMALL_SHAPES = st.lists(st.integers(0, 3), max_size=4).map(tuple)
# As each shape is compiled.
FEW = settings(max_examples=15, deadline=None)


def matrices(shape):
    """The shape of a parameter as a stack of matrices: taps, inputs, outputs."""
    layout = Layout.of_shape(shape)
    return layout.count("taps"), layout.count("inputs"), layout.count("outputs")


def gradient(shape, seed):
    """Normal numbers, in float64; one of four taps is zero."""
    rng = np.random.default_rng(seed)
    taps, d_in, d_out = matrices(shape)
    stack = rng.normal(size=(taps, d_in, d_out)) * (rng.random((taps, 1, 1)) < 0.75)
    return stack.reshape(shape)


@jax.jit
def measure(grad):
    layout = Layout.of_shape(grad.shape)
    norms = layout.norms(grad)
    return layout.dual_norm(norms), layout.direction(grad, norms)


def measured(grad):
    """The dual norm, and the direction as a stack of matrices."""
    with jax.enable_x64(True):
        norm, direction = measure(grad)
    assert direction.shape == grad.shape
    assert direction.dtype == norm.dtype == np.float64
    return float(norm), np.reshape(direction, matrices(grad.shape))


@given(shape=SHAPES)
def test_a_parameter_is_a_stack_of_matrices_with_one_scale(shape):
    taps, d_in, d_out = matrices(shape)
    assert (d_in, d_out) == (1, 1, *shape)[-2:]
    assert taps * d_in * d_out == math.prod(shape)
    if taps * d_in:
        assert Layout.of_shape(shape).scale ** 2 * d_in * taps == pytest.approx(d_out)


@FEW
@given(shape=SMALL_SHAPES, seed=st.integers(0, 99))
def test_a_direction_attains_the_dual_norm_with_taps_of_the_size_of_the_scale(shape, seed):
    grad = gradient(shape, seed)
    norm, direction = measured(grad)
    assert np.vdot(grad, direction) == pytest.approx(norm, rel=1e-12)
    moves = np.any(grad.reshape(direction.shape), axis=(1, 2))
    sizes = np.linalg.norm(direction, axis=(1, 2))
    np.testing.assert_allclose(sizes, Layout.of_shape(shape).scale * moves, rtol=1e-12)


@FEW
@given(shape=SMALL_SHAPES, seed=st.integers(0, 99), factor=st.floats(1e-9, 1e9))
def test_the_size_of_a_gradient_changes_its_norm_and_not_its_direction(shape, seed, factor):
    grad = gradient(shape, seed)
    norm, direction = measured(grad)
    scaled_norm, scaled_direction = measured(factor * grad)
    assert scaled_norm == pytest.approx(factor * norm, rel=1e-12)
    np.testing.assert_allclose(scaled_direction, direction, rtol=1e-12)


@FEW
@given(taps=SMALL_SHAPES, matrix=st.tuples(st.integers(0, 3), st.integers(0, 3)))
def test_the_axes_of_taps_may_be_merged(taps, matrix):
    grad = gradient((*taps, *matrix), seed=0)
    merged = grad.reshape(math.prod(taps), *matrix)
    assert matrices(grad.shape) == merged.shape
    (norm, direction), (merged_norm, merged_direction) = measured(grad), measured(merged)
    assert norm == pytest.approx(merged_norm, rel=1e-12)
    np.testing.assert_allclose(direction, merged_direction, rtol=1e-12)
