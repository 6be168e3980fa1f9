"""Starting weights for AGD: random orthogonal matrices of the right scale."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from agd_jax import names
from agd_jax.geometry import VECTORS, Geometry, Layout, norm_dtype, path_of

Tree = TypeVar("Tree")


def orthogonal_init(key: jax.Array, params: Tree, geometry: Geometry | None = None) -> Tree:
    """Redraws every matrix of a parameter tree as AGD wants it to start.

    Each block of a parameter (see :mod:`agd_jax.geometry`) is drawn uniformly from the
    semi-orthogonal ``(d_in, d_out)`` matrices (from the Haar measure) and multiplied by the
    parameter's scale ``s``: ``W.T @ W == s**2 * I`` where ``d_in >= d_out``, and
    ``W @ W.T == s**2 * I`` where ``d_in <= d_out``. A row of an embedding is such a matrix with one
    input: a direction, of length ``sqrt(d_out)``.

    >>> import jax, jax.numpy as jnp
    >>> params = {'kernel': jnp.zeros((8, 2)), 'bias': jnp.ones(2)}
    >>> params = orthogonal_init(jax.random.key(0), params)
    >>> gram = params['kernel'].T @ params['kernel']
    >>> bool(jnp.allclose(gram, 2 / 8 * jnp.eye(2), atol=1e-6)), params['bias'].tolist()
    (True, [1.0, 1.0])

    Args:
      key: a JAX random key.
      params: any pytree. All leaves that are not floating arrays are returned as they are.
      geometry: how each parameter is used, from :func:`agd_jax.geometry_of`. With it, offsets are
        set to zero and scales to one. Without it, floating arrays with two or more axes are
        redrawn, unless they are named ``bias``, and all other leaves (biases, norm scales) are
        returned as they are.

    Returns:
      A tree of the same structure, shapes, dtypes and shardings. What is drawn depends on
      ``key``, on the shapes and on their order in the tree alone, not on the sharding.

    Raises:
      ValueError: if the geometry is of other parameters.

    Warns:
      UserWarning: without a geometry, if shapes do not say enough.
    """
    if geometry is None:
        names.warn_of_ambiguous_shapes(params)
    paths_and_leaves, structure = jax.tree.flatten_with_path(params)
    keys = jax.random.split(key, max(len(paths_and_leaves), 1))

    def start(key: jax.Array, path: Any, leaf: Any) -> Any:
        if not (hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)):
            return leaf
        if geometry is None:
            drawn = leaf.ndim >= 2 and not names.is_bias(path)
            return _draw(key, leaf, Layout.of_shape(leaf.shape)) if drawn else leaf
        layout = geometry.layout(path_of(path), leaf)
        if layout.kind in VECTORS:
            return jnp.full_like(leaf, layout.kind == "scale")
        return _draw(key, leaf, layout)

    drawn = [
        start(key, path, leaf) for key, (path, leaf) in zip(keys, paths_and_leaves, strict=False)
    ]
    redrawn: Tree = jax.tree.unflatten(structure, drawn)
    return redrawn


def _draw(key: jax.Array, leaf: Any, layout: Layout) -> jax.Array:
    d_in, d_out = layout.count("inputs"), layout.count("outputs")
    count = layout.count("layers", "blocks", "taps")
    # Lower precisions have no QR decomposition, and would not be orthogonal before rounding.
    dtype = norm_dtype(leaf.dtype)

    def draw() -> jax.Array:
        # One by one: on a CPU, XLA hands the matrices of one batched QR to its thread pool from
        # within that pool and waits for them, so that a few such calls in one program hang it.
        one = lambda key: jax.random.orthogonal(key, d_in, (), dtype, m=d_out)
        if layout.kind == "lookup":  # Directions, of which there are many.
            drawn = jax.random.normal(key, (count, 1, d_out), dtype)
            matrices = drawn / jnp.linalg.norm(drawn, axis=2, keepdims=True)
        elif count == 1:
            matrices = jax.lax.map(one, key[None])
        else:
            matrices = jax.lax.map(one, jax.random.split(key, count))
        return layout.from_rows(layout.scale * matrices).astype(leaf.dtype)

    # Under a trace there is no sharding to keep: that of the traced function's outputs rules.
    if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and leaf.committed:
        # Not device_put, which gives a process nothing of an array that others share.
        draw = jax.jit(draw, out_shardings=leaf.sharding)
    return draw()
