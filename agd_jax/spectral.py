"""The directions of steepest descent in the operator norm: orthogonal factors of matrices."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp

# Polynomials a x + b x^3 + c x^5 in the singular values, each of which is the best for what the one
# before leaves: Amsel et al., The Polar Express, 2025, https://arxiv.org/abs/2505.16932. The margin
# is theirs, for rounding.
POLYNOMIALS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845749493, 0.4188073119525673),
)
MARGIN = 1.01


def orthogonal_factors(layouts: Any, grads: Any, norms: Any) -> tuple[Any, Any]:
    r"""Replaces each matrix of a tree of gradients by its orthogonal factor.

    That of :math:`g = U \Sigma V^T` is :math:`U V^T`: of all matrices whose operator norm is one,
    it goes up the steepest. It is computed to a few percent, by matrix products alone: singular
    values above a thousandth of the Frobenius norm become 0.9 to 1.1, smaller ones less. Matrices
    of one shape are computed together.

    Args:
      layouts: a tree with the layout of each gradient.
      grads: the gradients, in float32 or float64.
      norms: the norms of their blocks.

    Returns:
      The gradients and their norms, for :meth:`Layout.direction`. Blocks with several inputs and
      outputs are replaced, and their norms are one, or zero where they were.
    """
    leaves, structure = jax.tree.flatten(grads)
    of_leaves, found = jax.tree.leaves(norms), jax.tree.leaves(layouts)
    alike: dict[Any, list[tuple[int, jax.Array]]] = defaultdict(list)
    for index, (layout, leaf, norm) in enumerate(zip(found, leaves, of_leaves, strict=True)):
        if layout.kind not in ("matrix", "convolution") or 1 in layout.matrix_shape:
            continue
        of_leaves[index] = jnp.where(norm == 0, 0, jnp.ones_like(norm))
        matrices = layout.to_matrices(leaf)
        if matrices.shape[1] > matrices.shape[2]:
            matrices = jnp.swapaxes(matrices, 1, 2)
        alike[matrices.shape[1:], matrices.dtype].append((index, matrices))
    for group in alike.values():
        stacks = [matrices for _, matrices in group]
        factors = polar_factor(jnp.concatenate(stacks) if len(stacks) > 1 else stacks[0])
        start = 0
        for index, matrices in group:
            layout, factor = found[index], factors[start : start + len(matrices)]
            start += len(matrices)
            if factor.shape[1:] != layout.matrix_shape:
                factor = jnp.swapaxes(factor, 1, 2)
            leaves[index] = layout.from_matrices(factor)
    return jax.tree.unflatten(structure, leaves), jax.tree.unflatten(structure, of_leaves)


def polar_factor(matrices: jax.Array) -> jax.Array:
    """Returns the orthogonal factors of matrices ``(count, m, n)``, best with ``m <= n``.

    >>> x = jnp.array([[[3.0, 0.0, 0.0], [0.0, 0.1, 0.0]]])
    >>> jnp.round(polar_factor(x)[0], 1).tolist()
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    """
    norms = jnp.linalg.norm(matrices, axis=(1, 2), keepdims=True)
    x = jnp.where(norms == 0, 0, matrices / (MARGIN * norms))
    for a, b, c in POLYNOMIALS:
        gram = x @ jnp.swapaxes(x, 1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x
