"""Starting weights for AGD: random orthogonal matrices of the right scale."""

import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from agd_jax import geometry

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
      params: any pytree. Floating arrays with two or more axes are redrawn; their values are
        not read. All other leaves (biases, norm scales, anything that is not a floating array)
        are returned as they are.

    Returns:
      A tree of the same structure, shapes, dtypes and shardings. What is drawn depends on
      ``key``, on the shapes and on their order in the tree alone, not on the sharding.
    """
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, max(len(leaves), 1))
    redrawn: Tree = jax.tree.unflatten(structure, map(_redraw, keys, leaves))
    return redrawn


def _redraw(key: jax.Array, leaf: Any) -> Any:
    if not (hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.ndim >= 2):
        return leaf
    *taps, d_in, d_out = leaf.shape
    # Lower precisions have no QR decomposition, and would not be orthogonal before rounding.
    dtype = geometry.norm_dtype(leaf.dtype)
    # Tap by tap: on a CPU, XLA hands the matrices of one batched QR to its thread pool from
    # within that pool and waits for them, so that a few such calls in one program hang it.
    draw = lambda key: jax.random.orthogonal(key, d_in, (), dtype, m=d_out)
    count = math.prod(taps)
    matrices = jax.lax.map(draw, key[None] if count == 1 else jax.random.split(key, count))
    drawn = (geometry.scale(leaf.shape) * matrices).reshape(leaf.shape).astype(leaf.dtype)
    # Under a trace there is no sharding to keep: that of the traced function's outputs rules.
    if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and leaf.committed:
        drawn = jax.device_put(drawn, leaf.sharding)
    return drawn
