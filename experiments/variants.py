"""Variants of spectral AGD that were tried: each is spectral AGD with one thing changed."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import agd_jax
from agd_jax.averaging import PARTS, AverageState
from agd_jax.geometry import MATRICES, Layout, layouts_of
from agd_jax.optimizer import (
    MOMENTUM,
    ROUNDING_UNITS,
    MomentumState,
    automatic_learning_rate,
    averaged_gradients,
    growing_slowly,
)
from agd_jax.spectral import orthogonal_factors


class State(NamedTuple):
    """The state of a variant: that of spectral AGD, and what each variant has besides."""

    eta: jax.Array
    gradient_summary: jax.Array
    steps: jax.Array
    mean: Any
    squares: Any
    start: Any
    farthest: Any


def spectral(
    revision: int,
    geometry: agd_jax.Geometry,
    *,
    momentum: float = MOMENTUM,
    growth: Literal["slow", "free", "never"] = "slow",
    tables: float = 1.0,
    ends: float = 1.0,
    rows: bool = False,
    nuclear: bool = False,
    distance: bool = False,
    decay: float = 0.0,
    relative: bool = False,
) -> optax.GradientTransformation:
    """Returns spectral AGD with averaged weights and changes.

    Args:
      revision: for the key of a run alone.
      geometry: how parameters are used.
      momentum: the decay of the running mean of gradients.
      growth: whether G grows no faster than the number of steps, freely, or never.
      tables: a factor for the steps of lookups.
      ends: a factor for the steps of the last matrix.
      rows: normalises outputs by a running mean of their squares (NorMuon, arXiv:2510.05491).
      nuclear: measures G by nuclear norms, the dual of the operator norm (PolarGrad,
        arXiv:2505.21799).
      distance: bounds the step of each tensor by its largest distance from the start over the root
        of the number of steps (arXiv:2605.18999).
      decay: weight decay, as a part of each step.
      relative: lets the steps of a matrix grow as its norm does, so that their relative size does
        not fall.
    """
    flat = geometry.layouts
    matrices = [path for path, one in flat.items() if one.kind == "matrix"]
    last = next((path for path in matrices if "head" in path), matrices[-1])
    factor_of = {path: tables if one.kind == "lookup" else 1.0 for path, one in flat.items()}
    factor_of[last] *= ends
    depth = geometry.depth or 1.0

    def init(params: Any) -> State:
        zeros = jax.tree.map(jnp.zeros_like, params)
        zero = jnp.zeros([])
        none = jax.tree.map(lambda p: zero, params)
        start = jax.tree.map(jnp.array, params) if distance or relative else none
        steps = jnp.zeros([], jnp.int32)
        return State(zero, zero, steps, zeros, zeros if rows else none, start, none)

    def update(grads: Any, state: State, params: Any) -> tuple[Any, State]:
        before = MomentumState(*state[:4])
        layouts = layouts_of(grads, geometry)
        ahead, steps, mean = averaged_gradients(layouts, grads, before, momentum)
        t = steps.astype(jnp.float32)
        norms = jax.tree.map(Layout.norms, layouts, ahead)
        duals = jax.tree.map(Layout.dual_norm, layouts, norms)
        total = optax.tree.sum(duals)
        factors, units = orthogonal_factors(layouts, ahead, norms)
        measured = total
        if nuclear:
            # Of a matrix <m, O>, where O has the size of its taps; of all else what it was.
            inner = jax.tree.map(
                lambda one, m, o, d, n, u: jnp.sum(d) if n is u else one.scale * jnp.sum(m * o),
                layouts,
                ahead,
                factors,
                duals,
                norms,
                units,
            )
            measured = optax.tree.sum(inner)
        summary = jnp.divide(measured, depth)
        if growth == "slow":
            summary = growing_slowly(summary, before)
        elif growth == "never":
            summary = jnp.where(steps > 1, jnp.minimum(summary, state.gradient_summary), summary)
        eta = automatic_learning_rate(summary)
        squares, farthest = state.squares, state.farthest
        if rows:
            squares = jax.tree.map(_mean_square, layouts, factors, squares)
            normalised = lambda one, o, v: _normalised(one, o, v, t)
            factors = jax.tree.map(normalised, layouts, factors, squares)
        if distance:
            moved = jax.tree.map(lambda p, s: p - s, params, state.start)
            gone = jax.tree.map(lambda one, d: jnp.max(one.norms(d)) / one.scale, layouts, moved)
            farthest = jax.tree.map(jnp.maximum, farthest, gone)

        def step(
            one: Layout, o: Any, u: Any, d: Any, p: Any, own: float, start: Any, far: Any
        ) -> Any:
            size = own * eta / depth
            matrix = one.kind in MATRICES
            if distance:
                size = jnp.where(t > 10, jnp.minimum(size, far / jnp.sqrt(t)), size)
            if relative and matrix:
                size = size * jnp.maximum(jnp.linalg.norm(p) / jnp.linalg.norm(start), 1)
            move = jnp.where(d < ROUNDING_UNITS * np.finfo(d.dtype).eps * total, 0, size)
            kept = decay * size * p if decay and matrix else 0
            return one.direction(o, u, -move) - kept

        own = jax.tree.unflatten(jax.tree.structure(grads), factor_of.values())
        updates = jax.tree.map(
            step, layouts, factors, units, duals, params, own, state.start, farthest
        )
        return updates, State(eta, summary, steps, mean, squares, state.start, farthest)

    return agd_jax.averaged(optax.GradientTransformation(init, update))


class BetweenState(NamedTuple):
    """The state of :func:`between`: the iterate, and the state of spectral AGD with averages."""

    iterate: Any
    inner: AverageState


def between(
    revision: int, geometry: agd_jax.Geometry, power: float, momentum: float
) -> optax.GradientTransformation:
    """Returns spectral AGD whose gradient is taken between the iterate and the average.

    Towards the average with time, as in AMUSE (arXiv:2605.22432): the parameters are
    ``(1 - b) * iterate + b * average``, ``b = 1 - (10 / (10 + steps)) ** power``.

    Args:
      revision: for the key of a run alone.
      geometry: how parameters are used.
      power: how soon it is the average.
      momentum: as of :func:`spectral`.
    """
    tx = agd_jax.averaged(agd_jax.agd(geometry=geometry, norm="spectral", momentum=momentum))

    def init(params: Any) -> BetweenState:
        return BetweenState(jax.tree.map(jnp.array, params), tx.init(params))

    def update(grads: Any, state: BetweenState, params: Any) -> tuple[Any, BetweenState]:
        updates, inner = tx.update(grads, state.inner, state.iterate)
        iterate = optax.apply_updates(state.iterate, updates)
        ahead = (PARTS / (PARTS + inner.steps.astype(jnp.float32))) ** power
        move = lambda w, a, p: ahead * w + (1 - ahead) * a - p
        return jax.tree.map(move, iterate, inner.average, params), BetweenState(iterate, inner)

    return optax.GradientTransformation(init, update)


def _mean_square(one: Layout, o: jax.Array, v: jax.Array) -> jax.Array:
    if one.kind not in MATRICES:
        return v
    seen = jnp.square(o.reshape(one.view))
    mean = jnp.mean(seen, axis=(*one.inputs, *one.taps), keepdims=True)
    return 0.95 * v + 0.05 * jnp.broadcast_to(mean, one.view).reshape(one.shape)


def _normalised(one: Layout, o: jax.Array, v: jax.Array, t: jax.Array) -> jax.Array:
    if one.kind not in MATRICES:
        return o
    scaled = o / jnp.sqrt(v / (1 - 0.95**t) + 1e-12)
    norms = [jnp.linalg.norm(x.ravel()) for x in (o, scaled)]
    return jnp.multiply(scaled, norms[0] / (norms[1] + 1e-12))
