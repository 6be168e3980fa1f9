"""Starting weights for AGD: random orthogonal matrices of the right scale."""

import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from agd_jax import geometry, names

Tree = TypeVar("Tree")


def orthogonal_init(key: jax.Array, params: Tree) -> Tree:
    """Redraws every matrix of a parameter tree as AGD wants it to start.

    Each tap of a parameter (see :mod:`agd_jax.geometry`) is drawn uniformly from the
    semi-orthogonal ``(d_in, d_out)`` matrices (from the Haar measure) and multiplied by the
    parameter's scale ``s``: ``W.T @ W == s**2 * I`` where ``d_in >= d_out``, and
    ``W @ W.T == s**2 * I`` where ``d_in <= d_out``.

    >>> import jax, jax.numpy as jnp
    >>> params = {'kernel': jnp.zeros((8, 2)), 'bias': jnp.ones(2)}
    >>> params = orthogonal_init(jax.random.key(0), params)
    >>> gram = params['kernel'].T @ params['kernel']
    >>> bool(jnp.allclose(gram, 2 / 8 * jnp.eye(2), atol=1e-6)), params['bias'].tolist()
    (True, [1.0, 1.0])

    Args:
      key: a JAX random key.
      params: any pytree. Floating arrays with two or more axes are redrawn, unless they are named
        ``bias``; their values are not read. All other leaves (biases, norm scales, anything that
        is not a floating array) are returned as they are.

    Returns:
      A tree of the same structure, shapes, dtypes and shardings. What is drawn depends on
      ``key``, on the shapes and on their order in the tree alone, not on the sharding.

    Warns:
      UserWarning: of parameters whose axes are known to be in another order than Flax's dense and
        convolution kernels have them, so that their matrices are not drawn right.
    """
    names.warn_of_misread_axes(params)
    paths_and_leaves, structure = jax.tree.flatten_with_path(params)
    keys = jax.random.split(key, max(len(paths_and_leaves), 1))
    drawn = [
        _draw(key, leaf) if _is_matrix(leaf) and not names.is_bias(path) else leaf
        for key, (path, leaf) in zip(keys, paths_and_leaves, strict=False)
    ]
    redrawn: Tree = jax.tree.unflatten(structure, drawn)
    return redrawn


def _is_matrix(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.ndim >= 2


def _draw(key: jax.Array, leaf: Any) -> jax.Array:
    *taps, d_in, d_out = leaf.shape
    count = math.prod(taps)
    # Lower precisions have no QR decomposition, and would not be orthogonal before rounding.
    dtype = geometry.norm_dtype(leaf.dtype)

    def draw() -> jax.Array:
        # Tap by tap: on a CPU, XLA hands the matrices of one batched QR to its thread pool from
        # within that pool and waits for them, so that a few such calls in one program hang it.
        one = lambda key: jax.random.orthogonal(key, d_in, (), dtype, m=d_out)
        matrices = jax.lax.map(one, key[None] if count == 1 else jax.random.split(key, count))
        drawn: jax.Array = geometry.scale(leaf.shape) * matrices
        return drawn.reshape(leaf.shape).astype(leaf.dtype)

    # Under a trace there is no sharding to keep: that of the traced function's outputs rules.
    if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and leaf.committed:
        # Not device_put, which gives a process nothing of an array that others share.
        draw = jax.jit(draw, out_shardings=leaf.sharding)
    return draw()
