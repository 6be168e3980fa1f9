"""How AGD sees one parameter: a stack of matrices with a scale, a norm and a direction.

Array axes follow Flax. The last two axes of a parameter are the inputs and the outputs of a
matrix; every axis before them counts *taps*, matrices that share one scale and are normalised
each by itself. So a dense kernel ``(d_in, d_out)`` is one tap, and a convolution kernel
``(k_h, k_w, d_in, d_out)`` has ``k_h * k_w`` of them. A vector of ``d_out`` entries maps the
constant 1 to ``d_out`` outputs, and is one matrix of shape ``(1, d_out)``; a scalar is ``(1, 1)``.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp


def matrix_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """Returns ``(taps, d_in, d_out)`` of a parameter of this shape.

    >>> matrix_shape((3, 3, 64, 128))
    (9, 64, 128)
    >>> matrix_shape((10,))
    (1, 1, 10)
    """
    d_in, d_out = (1, 1, *shape)[-2:]
    return math.prod(shape[:-2]), d_in, d_out


def scale(shape: Sequence[int]) -> float:
    """The scale ``s = sqrt(d_out / d_in) / sqrt(taps)`` of a parameter (paper, section 3).

    >>> scale((4, 16))
    2.0
    >>> scale((3, 3, 8, 8)) == 1 / 3
    True
    """
    taps, d_in, d_out = matrix_shape(shape)
    # Only an empty parameter has a zero here; it has no entries for its scale to matter to.
    return math.sqrt(d_out / max(d_in * taps, 1))


def norm_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """The dtype in which norms of such an array are taken: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def tap_norms(grad: jax.Array) -> jax.Array:
    """Frobenius norm of every tap.

    Args:
      grad: floating array of any shape and dtype.

    Returns:
      Norms in :func:`norm_dtype`, with ``grad``'s rank: the axes of the matrix have length 1.
      Squares of entries below about 1e-19 underflow in float32, so a tap of only such entries
      has norm zero.
    """
    squares = jnp.square(grad.astype(norm_dtype(grad.dtype)))
    matrix_axes = tuple(range(grad.ndim))[-2:]
    return jnp.sqrt(jnp.sum(squares, axis=matrix_axes, keepdims=True))


def dual_norm(grad: jax.Array) -> jax.Array:
    """What one parameter adds to the gradient summary: ``s * sum_taps ||g_tap||_F``, a scalar."""
    return scale(grad.shape) * jnp.sum(tap_norms(grad))


def direction(grad: jax.Array) -> jax.Array:
    """Steepest-ascent direction of unit size: ``s * g_tap / ||g_tap||_F`` for each tap.

    Args:
      grad: floating array of any shape and dtype.

    Returns:
      An array of ``grad``'s shape, in :func:`norm_dtype`; zero in a tap whose gradient is zero.
    """
    norms = tap_norms(grad)
    # Compared with zero, and not `norms > 0`, so that a NaN stays visible.
    factors = jnp.where(norms == 0, 0, scale(grad.shape) / norms)
    return factors * grad
