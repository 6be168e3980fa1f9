"""The directions of steepest descent in the operator norm: orthogonal factors of matrices."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from agd_jax.geometry import MATRICES

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
# With so many times as many columns as rows, products of the rows with one another are cheaper.
WIDE = 1.5


def orthogonal_factors(layouts: Any, grads: Any, norms: Any) -> tuple[Any, Any]:
    r"""Replaces each matrix of a tree of gradients by its orthogonal factor.

    That of :math:`g = U \Sigma V^T` is :math:`U V^T`: of all matrices whose operator norm is one,
    it goes up the steepest. Matrices of one shape are computed together, and where a mesh is set
    (``jax.set_mesh``), its devices share them out. The :math:`n` taps of a
    convolution's kernel are one matrix, from all inputs under it, whose factor is multiplied by
    :math:`\sqrt n`: times the kernel's scale, that is as large as the kernel is that
    :func:`agd_jax.orthogonal_init` draws, tap by tap.

    Args:
      layouts: a tree with the layout of each gradient.
      grads: the gradients, in float32 or float64.
      norms: the norms of their blocks.

    Returns:
      The gradients and their norms, for :meth:`Layout.direction`. Matrices with several rows and
      columns are replaced, and their norms are one, or zero where they were.
    """
    if AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
        # Within, XLA chooses how arrays are split; after it, they are as they were.
        specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (grads, norms))
        split = any(axis is not None for spec in jax.tree.leaves(specs[0]) for axis in spec)
        within = functools.partial(_orthogonal_factors, layouts, split)
        found: tuple[Any, Any] = jax.sharding.auto_axes(within, out_sharding=specs)(grads, norms)
        return found
    return _orthogonal_factors(layouts, False, grads, norms)


def _orthogonal_factors(layouts: Any, split: bool, grads: Any, norms: Any) -> tuple[Any, Any]:
    leaves, structure = jax.tree.flatten(grads)
    of_leaves, found = jax.tree.leaves(norms), jax.tree.leaves(layouts)
    alike: dict[Any, list[tuple[int, jax.Array]]] = defaultdict(list)
    for index, (layout, leaf) in enumerate(zip(found, leaves, strict=True)):
        shape = layout.count("taps", "inputs"), layout.count("outputs")
        if layout.kind not in MATRICES or 1 in shape:
            continue
        of_leaves[index] = jnp.where(of_leaves[index] == 0, 0, jnp.ones_like(of_leaves[index]))
        alike[shape, leaf.dtype].append((index, layout.to_rows(leaf).reshape(-1, *shape)))
    for group in alike.values():
        stacks = [matrices for _, matrices in group]
        factors = _shared_out(jnp.concatenate(stacks) if len(stacks) > 1 else stacks[0], split)
        start = 0
        for index, matrices in group:
            factor, layout = factors[start : start + len(matrices)], found[index]
            start += len(matrices)
            leaves[index] = math.sqrt(layout.count("taps")) * layout.from_rows(factor)
    return jax.tree.unflatten(structure, leaves), jax.tree.unflatten(structure, of_leaves)


def _shared_out(matrices: jax.Array, split: bool) -> jax.Array:
    """Computes :func:`polar_factor`, each device of the mesh that is set for its share of them.

    Args:
      matrices: of one shape, as :func:`polar_factor` takes them.
      split: whether they are of split gradients, so that no device is to hold all of them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    axes = tuple(name for name, kind in kinds if kind == AxisType.Auto)
    if math.prod(mesh.shape[name] for name in axes) == 1 or len(matrices) == 1:
        return polar_factor(matrices)
    place: Any = jax.lax.with_sharding_constraint
    outside, shares = PartitionSpec(*(None, axes) if split else ()), PartitionSpec(axes)
    # Said before and after too, or XLA splits whole gradients and updates by rows.
    factors = polar_factor(place(place(matrices, outside), shares))
    result: jax.Array = place(place(factors, shares), outside)
    return result


def polar_factor(matrices: jax.Array) -> jax.Array:
    """Returns the orthogonal factors of matrices ``(count, m, n)``.

    They are computed to a tenth, by matrix products alone: singular values above a thousandth of
    the Frobenius norm become 0.88 to 1.12, smaller ones less.

    >>> x = jnp.array([[[3.0, 0.0, 0.0], [0.0, 0.1, 0.0]]])
    >>> jnp.round(polar_factor(x)[0]).tolist()
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    """
    norms = jnp.linalg.norm(matrices, axis=(1, 2), keepdims=True)
    x = jnp.where(norms == 0, 0, matrices / (MARGIN * norms))
    tall = x.shape[1] > x.shape[2]
    short, long = sorted(x.shape[1:])

    # From the side of the columns where these are fewer, since transposing would take as long as
    # much of the arithmetic.
    def gram_of(x: jax.Array) -> jax.Array:
        return jnp.einsum("kji,kjl->kil" if tall else "kij,klj->kil", x, x)

    def times(symmetric: jax.Array, x: jax.Array) -> jax.Array:
        return x @ symmetric if tall else symmetric @ x

    if long < WIDE * short:
        for a, b, c in POLYNOMIALS:
            gram = gram_of(x)
            x = a * x + times(b * gram + c * gram @ gram, x)
        return x
    # Each polynomial is a small matrix times x. These are multiplied first; what they do to the
    # Gram matrix makes the next. Rounding grows here, so that TF32 or bfloat16 would not do.
    with jax.default_matmul_precision("highest"):
        gram, factors = gram_of(x), []
        for a, b, c in POLYNOMIALS:
            factor = a * jnp.eye(short, dtype=x.dtype) + b * gram + c * gram @ gram
            factors.append(factor)
            gram = factor @ gram @ factor
        return times(functools.reduce(jnp.matmul, factors), x)
