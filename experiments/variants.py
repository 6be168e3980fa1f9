"""Variants of spectral AGD that were tried: each is spectral AGD with one thing changed."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import agd_jax
from agd_jax.geometry import Layout, layouts_of
from agd_jax.optimizer import automatic_learning_rate
from agd_jax.spectral import orthogonal_factors


class State(NamedTuple):
    """The state of a variant; each uses a part of it."""

    steps: jax.Array
    mean: Any
    eta: jax.Array
    summary: jax.Array
    squares: Any
    start: Any
    farthest: Any


def spectral(
    revision: int,
    geometry: agd_jax.Geometry,
    *,
    momentum: float = 0.95,
    growing: bool = False,
    summary: str = "depth",
    cap: str = "",
    share: float = 1.0,
    vectors: float = 1.0,
    tables: float = 1.0,
    ends: float = 1.0,
    rows: bool = False,
    whole_kernels: bool = False,
    nuclear: bool = False,
    distance: bool = False,
    decay: float = 0.0,
) -> optax.GradientTransformation:
    """Returns spectral AGD with averaged weights and changes.

    Args:
      revision: a higher one has its runs taken again.
      geometry: how parameters are used.
      momentum: the decay of the running mean of gradients.
      growing: lets the momentum grow with the step, to it.
      summary: what divides the sum in G: the effective ``depth`` or the number of ``tensors``.
      cap: no G but the ``least`` so far counts, or one that grows no faster than the step
        (``slow``).
      share: a factor for all steps.
      vectors: a factor for the steps of offsets and scales.
      tables: a factor for the steps of lookups.
      ends: a factor for the steps of the last matrix.
      rows: normalises outputs by a running mean of their squares (NorMuon, arXiv:2510.05491).
      whole_kernels: takes a kernel with its taps as one matrix.
      nuclear: measures G by nuclear norms, the dual of the operator norm (PolarGrad,
        arXiv:2505.21799).
      distance: bounds eta by the distance from the start over the root of the step, for each
        tensor (arXiv:2605.18999).
      decay: weight decay, as a part of each step.
    """
    flat = geometry.layouts
    if whole_kernels:
        flat = {path: _whole(one) for path, one in flat.items()}
    geometry = agd_jax.Geometry(flat, geometry.structure, geometry.depth)
    matrices = [path for path, one in flat.items() if one.kind == "matrix"]
    last = next((path for path in matrices if "head" in path), matrices[-1])
    of_path = {
        path: vectors if one.kind in ("offset", "scale") else tables if one.kind == "lookup" else 1
        for path, one in flat.items()
    }
    of_path[last] *= ends
    shares = list(of_path.values())

    def init(params: Any) -> State:
        zeros = jax.tree.map(jnp.zeros_like, params)
        zero = jnp.zeros([])
        none = jax.tree.map(lambda p: jnp.zeros([]), params)
        squares = zeros if rows else none
        start = jax.tree.map(jnp.array, params) if distance else none
        return State(jnp.zeros([], jnp.int32), zeros, zero, zero, squares, start, none)

    def update(grads: Any, state: State, params: Any) -> tuple[Any, State]:
        count = state.steps + 1
        t = count.astype(jnp.float32)
        beta = jnp.minimum(momentum, t / (t + 3)) if growing else jnp.float32(momentum)
        mean = optax.tree.update_moment(grads, state.mean, beta, 1)
        if growing:
            ahead = optax.tree.update_moment(grads, mean, beta, 1)
        else:
            ahead = optax.tree.update_moment(
                optax.tree.bias_correction(grads, beta, count),
                optax.tree.bias_correction(mean, beta, count + 1),
                beta,
                1,
            )
        layouts = layouts_of(grads, geometry)
        norms = jax.tree.map(Layout.norms, layouts, ahead)
        duals = jax.tree.map(Layout.dual_norm, layouts, norms)
        total = jnp.sum(jnp.stack([jnp.sum(dual) for dual in jax.tree.leaves(duals)]))
        tensors = sum(layout.count("layers") for layout in jax.tree.leaves(layouts))
        depth = geometry.depth or max(tensors, 1)
        factors, units = orthogonal_factors(layouts, ahead, norms)
        measured = total
        if nuclear:
            # Of a matrix <m, O>; of all else what it was.
            inner = jax.tree.map(
                lambda one, m, o, d, n, u: jnp.sum(d) if n is u else one.scale * jnp.sum(m * o),
                layouts,
                ahead,
                factors,
                duals,
                norms,
                units,
            )
            measured = jnp.sum(jnp.stack(jax.tree.leaves(inner)))
        summed = jnp.divide(measured, depth if summary == "depth" else tensors)
        before = jnp.where(count == 1, jnp.inf, state.summary)
        if cap == "least":
            summed = jnp.minimum(summed, before)
        elif cap == "slow":
            summed = jnp.minimum(summed, before * t / jnp.maximum(t - 1, 1))
        eta = automatic_learning_rate(summed)
        squares, farthest = state.squares, state.farthest
        if rows:
            squares = jax.tree.map(
                lambda one, o, v: _mean_square(one, o, v, t), layouts, factors, squares
            )
            factors = jax.tree.map(
                lambda one, o, v: _normalised(one, o, v, t), layouts, factors, squares
            )
        if distance:
            gone = jax.tree.map(
                lambda one, p, s: jnp.max(one.norms(p - s)) / one.scale,
                layouts,
                params,
                state.start,
            )
            farthest = jax.tree.map(jnp.maximum, farthest, gone)

        def step(one: Layout, o: Any, u: Any, d: Any, p: Any, own: float, far: Any) -> Any:
            size = share * own * eta / depth
            if distance:
                size = jnp.where(t > 10, jnp.minimum(size, far / jnp.sqrt(t)), size)
            move = jnp.where(d < 64 * 1.2e-7 * total, 0, size)
            kept = decay * size * p if decay and one.kind in ("matrix", "convolution") else 0
            return one.direction(o, u, -move) - kept

        likes = grads if params is None else params
        own = jax.tree.unflatten(jax.tree.structure(grads), shares)
        updates = jax.tree.map(step, layouts, factors, units, duals, likes, own, farthest)
        return updates, State(count, mean, eta, summed, squares, state.start, farthest)

    return agd_jax.averaged(optax.GradientTransformation(init, update))


def _whole(one: Layout) -> Layout:
    """Returns a layout whose taps are inputs too."""
    if not one.taps:
        return one
    inputs = (*one.taps, *one.inputs)
    return Layout(one.kind, one.shape, one.view, inputs, one.outputs, (), one.blocks, one.layers)


def _mean_square(one: Layout, o: jax.Array, v: jax.Array, t: jax.Array) -> jax.Array:
    if one.kind not in ("matrix", "convolution"):
        return v
    seen = jnp.square(o.reshape(one.view))
    mean = jnp.mean(seen, axis=one.inputs, keepdims=True)
    return 0.95 * v + 0.05 * jnp.broadcast_to(mean, one.view).reshape(one.shape)


def _normalised(one: Layout, o: jax.Array, v: jax.Array, t: jax.Array) -> jax.Array:
    if one.kind not in ("matrix", "convolution"):
        return o
    scaled = o / jnp.sqrt(v / (1 - 0.95**t) + 1e-12)
    norms = [jnp.linalg.norm(x.ravel()) for x in (o, scaled)]
    return jnp.multiply(scaled, norms[0] / (norms[1] + 1e-12))
