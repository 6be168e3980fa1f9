"""Automatic gradient descent as an Optax gradient transformation."""

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from agd_jax import names
from agd_jax.geometry import Geometry, Layout, layouts_of, norm_dtype
from agd_jax.spectral import orthogonal_factors

P = ParamSpec("P")
T = TypeVar("T")
Norm = Literal["frobenius", "spectral"]

# A tensor is left where it is if its share of the gradient summary is less than so many units of
# rounding. In float32, noise was measured to have up to 5. The smallest gradients that mean
# something, of queries' biases in transformers that start with almost no attention, had 500, and 40
# in the first steps of a deep one; those wait for a while, for next to nothing is lost by it.
ROUNDING_UNITS = 64
# That of the spectral form.
MOMENTUM = 0.9


class AgdState(NamedTuple):
    """What the last step found. None of it enters the next one: it is kept for logs.

    Attributes:
      eta: the automatic learning rate, a scalar (zero before the first step).
      gradient_summary: the gradient summary ``G``, a scalar (zero before the first step).
    """

    eta: jax.Array
    gradient_summary: jax.Array


class MomentumState(NamedTuple):
    """The state with momentum: what the last step found, and what the next one starts from.

    Attributes:
      eta: as of :class:`AgdState`.
      gradient_summary: likewise.
      steps: how many there were.
      mean: the running mean of gradients, a tree like the parameters, in float32 or float64.
    """

    eta: jax.Array
    gradient_summary: jax.Array
    steps: jax.Array
    mean: optax.Updates


def automatic_learning_rate(gradient_summary: jax.typing.ArrayLike) -> jax.Array:
    r"""The step size that a gradient summary asks for.

    .. math:: \eta = \log \frac{1 + \sqrt{1 + 4 G}}{2}

    is the minimum over :math:`\eta` of :math:`-\eta G + (e^\eta - 1)^2 / 2`, which bounds the
    change of the loss. It is computed as ``log1p(G / (1/2 + sqrt(1/4 + G)))``, the same number
    without the cancellation that would round the eta of a small ``G`` to zero, and without the
    product that would overflow for a large one.

    >>> float(automatic_learning_rate(0.0))
    0.0
    """
    g = jnp.asarray(gradient_summary)
    return jnp.log1p(g / (0.5 + jnp.sqrt(0.25 + g)))


def _without_learning_rate(make: Callable[P, T]) -> Callable[P, T]:
    """Answers ``agd(1e-3)`` by what to write, where Python would only count arguments."""

    @functools.wraps(make)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        if args or "learning_rate" in kwargs:
            raise TypeError(
                "agd() has no learning rate: where optax.adam(1e-3) stood, write agd(). Its "
                "arguments are given by name, as in agd(norm='spectral')"
            )
        return make(*args, **kwargs)

    return checked


@_without_learning_rate
def agd(
    *,
    geometry: Geometry | None = None,
    norm: Norm = "frobenius",
    momentum: jax.typing.ArrayLike | None = None,
    gain: jax.typing.ArrayLike = 1.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Automatic gradient descent: no learning rate, no schedule; as in the paper, no state either.

    With :math:`L` parameter tensors, the gradient :math:`g_{k,t}` of block :math:`t` of tensor
    :math:`k` (a tap of a convolution, a row of an embedding, or all of it) and its scale
    :math:`s_k` (see :mod:`agd_jax.geometry`), one step is

    .. math::
      G &= \frac{1}{L} \sum_k s_k \sum_t \|g_{k,t}\|_F \\
      \eta &= \log \frac{1 + \sqrt{1 + 4 G}}{2} \\
      W_{k,t} &\leftarrow W_{k,t}
        - \mathrm{gain} \, \frac{\eta}{L} \, s_k \, \frac{g_{k,t}}{\|g_{k,t}\|_F}

    A block whose gradient is zero does not move. Start from :func:`agd_jax.orthogonal_init`, for
    which the analysis behind the step holds.

    Neither does a tensor move whose gradient is nothing but rounding, as that of a convolution's
    bias before BatchNorm or of an attention key's bias, which change no output. The direction of
    such a gradient is noise, but has unit size like any other, and the tensor would grow without
    end. To first order a step lowers the loss by :math:`\eta G`, and tensor :math:`k` by its share
    of that, :math:`p_k = s_k \sum_t \|g_{k,t}\|_F / (L G)`. A backward pass through :math:`L`
    layers has a relative error of about :math:`L` units of rounding :math:`\epsilon`; with terms
    of the usual size :math:`G`, noise has :math:`p_k \approx L \epsilon G / (L G) = \epsilon`.
    Tensors with :math:`p_k < 64 \epsilon` do not move, which forgoes less than
    :math:`64 L \epsilon` of the decrease, 0.1% where :math:`L` is 100, as :math:`\epsilon` is
    that of the norms (1.2e-7 in float32). Networks without such tensors, as the paper's are, do
    not notice. Where a network computes in bfloat16, its noise is as large as other gradients, and
    cannot be told from them.

    **Spectral.** The Frobenius norm stands in for the operator norm, which bounds what a change of
    a matrix does to its outputs. With ``norm="spectral"`` the step is the steepest in the operator
    norm itself, and goes by the running mean of gradients:

    .. math::
      m_k &\leftarrow 0.9 \, m_k + 0.1 \, g_k \\
      W_k &\leftarrow W_k - \mathrm{gain} \, \frac{\eta}{L} \, s_k \sqrt{n_k} \, U V^T,
        \qquad m_k = U \Sigma V^T,

    in Nesterov's form and without the mean's bias towards zero. A kernel of :math:`n_k` taps is one
    matrix here, from all inputs under it (:mod:`agd_jax.spectral`); vectors and rows of embeddings
    step as before, and a row that is not looked up does not move. Where a mesh is set
    (``jax.set_mesh``), its devices share out the matrices, however the parameters are split. ``G``
    is that of the mean, by the same equation as above. To first order such a step lowers the loss
    by :math:`\eta / L` times the sum of :math:`s_k \sqrt{n_k} \|m_k\|_*`, with nuclear norms, the
    duals of operator norms, which is no less than the terms of ``G``; so :math:`\eta` is no more
    than the bound asks for. Nuclear norms would ask for more in noise, whose singular values are
    all alike: they multiply that of rank :math:`r` by up to :math:`\sqrt r`.

    What remains is feedback: steps that are too large make gradients grow, and with them ``G`` and
    the next steps. So with momentum, ``G`` grows no faster than the number of steps: after step
    :math:`t` to no more than :math:`(t + 1) / t` times what it was. A start in a flat place is left
    behind nevertheless, in a time in proportion to that spent there.

    Norms, ``G`` and ``eta`` are float32 (float64 for float64 gradients), whatever the dtype of the
    gradients; updates have the dtype of the parameters, or of the gradients where ``params`` is not
    given.

    >>> import agd_jax, jax, jax.numpy as jnp, optax
    >>> params = {'kernel': jnp.zeros((2, 1))}
    >>> params = agd_jax.orthogonal_init(jax.random.key(0), params)
    >>> x, y = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([[0.5], [-0.5]])
    >>> loss = lambda params: jnp.mean((x @ params['kernel'] - y) ** 2)
    >>> tx = agd_jax.agd()
    >>> opt_state = tx.init(params)
    >>> for _ in range(50):
    ...   grads = jax.grad(loss)(params)
    ...   updates, opt_state = tx.update(grads, opt_state, params)
    ...   params = optax.apply_updates(params, updates)
    >>> bool(loss(params) < 1e-3)
    True

    Args:
      geometry: how each parameter is used, from :func:`agd_jax.geometry_of`; the effective depth
        of the network then takes the place of :math:`L`, and offsets and scales take a smaller
        part of the step (:mod:`agd_jax.geometry`), both of which ``geometry.by_tensors()`` undoes.
        Without it, the shapes of parameters say it: the last two axes are inputs and outputs, those
        before count taps, as in Flax's dense and convolution kernels.
      norm: ``"frobenius"``, as in the paper, or ``"spectral"``.
      momentum: the decay of the running mean of gradients, at least 0 and less than 1; by default
        0, without a mean, for the Frobenius norm, and 0.9 for the spectral one.
      gain: multiplies every update. The method has no such number; 10 is an experiment some
        like to make.

    Returns:
      An Optax gradient transformation whose state is an :class:`AgdState`, two numbers; with
      momentum it is a :class:`MomentumState`, with an array for each parameter.

    Raises:
      TypeError: if a learning rate is given, which AGD does not have, or if ``gain`` is a
        schedule: Optax makes one of it, ``optax.inject_hyperparams(agd)(gain=schedule)``; by
        ``init``, if parameters are complex.
      ValueError: if ``norm`` or ``momentum`` is none of these; if ``gain`` is a number that is not
        positive and finite, or an array that is known to be negative or not finite, or not a
        scalar; by ``init`` and ``update``, if the geometry is of other parameters.

    Warns:
      UserWarning: by ``init`` without a geometry, if shapes do not say enough; and if the
        parameters are one bare vector, which is what ``optax.flatten`` makes of a network.

    References:
      Bernstein et al., *Automatic Gradient Descent: Deep Learning without Hyperparameters*,
      2023, https://arxiv.org/abs/2304.05187. Jordan et al., *Muon*, 2024,
      https://kellerjordan.github.io/posts/muon, for orthogonal factors of momentum.
    """
    _check(norm, momentum, gain)
    if momentum is None:
        momentum = 0.0 if norm == "frobenius" else MOMENTUM
    without_memory = isinstance(momentum, int | float) and momentum == 0

    def init(params: optax.Params) -> AgdState | MomentumState:
        if getattr(params, "ndim", None) == 1:
            warnings.warn(
                f"agd() was given one bare vector of {params.size} numbers, in which it sees no "
                "matrices. If these are the parameters of a network, take optax.flatten away from "
                "around it",
                stacklevel=2,
            )
        if any(jnp.iscomplexobj(leaf) for leaf in jax.tree.leaves(params)):
            raise TypeError(
                "agd() takes real parameters; for complex ones, write "
                "optax.contrib.split_real_and_imaginary(agd_jax.agd())"
            )
        if geometry is None:
            names.warn_of_ambiguous_shapes(params)
        layouts_of(params, geometry)  # Raises if it is of other parameters.
        dtypes = [norm_dtype(jnp.result_type(p)) for p in jax.tree.leaves(params)]
        dtype = jnp.result_type(jnp.float32, *dtypes)
        # Two arrays, as one that is there twice cannot be donated.
        found = AgdState(eta=jnp.zeros([], dtype), gradient_summary=jnp.zeros([], dtype))
        if without_memory:
            return found
        zeros = lambda p: jnp.zeros_like(p, norm_dtype(jnp.result_type(p)))
        return MomentumState(*found, jnp.zeros([], jnp.int32), jax.tree.map(zeros, params))

    def update(
        updates: optax.Updates,
        state: AgdState | MomentumState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AgdState | MomentumState]:
        del extra_args  # Accepted, so that agd() may stand in a chain with others that use them.
        updates = jax.tree.map(jnp.asarray, updates)  # Python's floats are gradients too.
        likes = updates if params is None else params
        layouts = layouts_of(updates, geometry)
        if isinstance(state, MomentumState):
            updates, steps, mean = averaged_gradients(layouts, updates, state, momentum)
        tensors = sum(layout.count("layers") for layout in jax.tree.leaves(layouts))
        depth = (geometry.depth if geometry else None) or max(tensors, 1)
        scaled, norms, exponent = _measure(layouts, updates)
        dual_norms = jax.tree.map(Layout.dual_norm, layouts, norms)
        total = _total(dual_norms)
        gradient_summary = jnp.ldexp(total / depth, exponent)
        # Of finite gradients it is finite, even if the sum is not.
        largest = jnp.where(jnp.isfinite(total), np.finfo(total.dtype).max, jnp.inf)
        gradient_summary = jnp.minimum(gradient_summary, largest)
        if isinstance(state, MomentumState):
            gradient_summary = growing_slowly(gradient_summary, state)
        eta = automatic_learning_rate(gradient_summary)
        size = jnp.multiply(gain, eta) / depth
        if norm == "spectral":
            scaled, norms = orthogonal_factors(layouts, scaled, norms)

        def step(
            layout: Layout,
            grad: jax.Array,
            norms: jax.Array,
            dual_norm: jax.Array,
            param: jax.typing.ArrayLike,
        ) -> jax.Array:
            floor = ROUNDING_UNITS * np.finfo(dual_norm.dtype).eps * total
            # Not `>= floor`, of which infinite and NaN gradients would make zeros.
            move = jnp.where(dual_norm < floor, 0, size)
            return layout.direction(grad, norms, -move).astype(jnp.result_type(param))

        updates = jax.tree.map(step, layouts, scaled, norms, dual_norms, likes)
        # The state keeps its dtype when gradients have another one, so that it can be carried.
        dtype = state.eta.dtype
        found = AgdState(eta.astype(dtype), jnp.asarray(gradient_summary, dtype))
        if isinstance(state, MomentumState):
            return updates, MomentumState(*found, steps, mean)
        return updates, found

    return optax.GradientTransformationExtraArgs(init, update)


def averaged_gradients(
    layouts: Any, grads: optax.Updates, state: MomentumState, decay: jax.typing.ArrayLike
) -> tuple[optax.Updates, jax.Array, optax.Updates]:
    """Returns the gradients that a step with momentum goes by, and the new steps and mean."""
    steps = optax.safe_increment(state.steps)
    grads = jax.tree.map(lambda g: g.astype(norm_dtype(g.dtype)), grads)
    mean = optax.tree.update_moment(grads, state.mean, decay, 1)
    # The mean after one more step with the same gradient, as in Nesterov's momentum.
    ahead = optax.tree.update_moment(
        optax.tree.bias_correction(grads, decay, steps),
        optax.tree.bias_correction(mean, decay, optax.safe_increment(steps)),
        decay,
        1,
    )

    def present(layout: Layout, ahead: jax.Array, grad: jax.Array) -> jax.Array:
        return layout.where_present(grad, ahead) if layout.kind == "lookup" else ahead

    return jax.tree.map(present, layouts, ahead, grads), steps, mean


def growing_slowly(summary: jax.Array, state: MomentumState) -> jax.Array:
    """Returns a gradient summary that has grown no more than the number of steps has."""
    before, steps = (x.astype(summary.dtype) for x in (state.gradient_summary, state.steps))
    limit = before * (steps + 1) / jnp.maximum(steps, 1)
    # There is no limit to the first that is not zero, nor may it hide what is not finite.
    limited = (before > 0) & jnp.isfinite(summary)
    return jnp.where(limited, jnp.minimum(summary, limit), summary)


def _total(dual_norms: Any) -> jax.Array:
    """Returns the sum of all dual norms, in float32 or float64."""
    terms = map(jnp.sum, jax.tree.leaves(dual_norms))
    return sum(terms, start=jnp.zeros([], jnp.float32))


def _measure(layouts: Any, grads: optax.Updates) -> tuple[optax.Updates, Any, jax.Array]:
    """Returns the norms of gradients of any size, whose squares may overflow or vanish.

    Where that may be, the gradients are multiplied by a power of two that makes the largest entry
    about one, and measured again. As nothing is rounded by it, the bits are those it would have.

    Returns:
      The gradients in float32 or float64, times a power of two; the norms of their blocks; and the
      exponent of the power of two that gives the original ones back, zero if they are as they were
      or not finite.
    """
    wide = jax.tree.map(lambda g: g.astype(norm_dtype(g.dtype)), grads)
    norms = jax.tree.map(Layout.norms, layouts, wide)
    total = _total(jax.tree.map(Layout.dual_norm, layouts, norms))
    # What matters in a sum that is not smaller has squares far from the least number.
    usual = jnp.isfinite(total) & (total > np.finfo(total.dtype).tiny ** 0.25)

    def scaled(exponent: jax.Array) -> optax.Updates:
        def scale(grad: jax.Array) -> jax.Array:
            # The greatest power of two that has an inverse.
            limit = np.finfo(grad.dtype).maxexp - 2
            unit = jnp.ldexp(jnp.ones([], grad.dtype), jnp.clip(-exponent, -limit, limit))
            return unit * grad

        return jax.tree.map(scale, wide)

    def again() -> tuple[Any, jax.Array]:
        largest = optax.tree.norm(wide, ord=jnp.inf)
        _, exponent = jnp.frexp(jnp.where(jnp.isfinite(largest), largest, 0))
        return jax.tree.map(Layout.norms, layouts, scaled(exponent)), exponent

    norms, exponent = jax.lax.cond(usual, lambda: (norms, jnp.zeros([], jnp.int32)), again)
    return scaled(exponent), norms, exponent


def _check(norm: Any, momentum: Any, gain: Any) -> None:
    if norm not in ("frobenius", "spectral"):
        raise ValueError(f"agd(norm={norm!r}): choose 'frobenius' or 'spectral'")
    if isinstance(momentum, int | float) and not 0 <= momentum < 1:
        raise ValueError(f"agd(momentum={momentum}): momentum must be at least 0 and less than 1")
    if callable(gain):
        raise TypeError(
            "agd(gain=...) takes a number; a schedule is used as "
            "optax.inject_hyperparams(agd_jax.agd)(gain=schedule)"
        )
    if np.ndim(gain) != 0:
        raise ValueError(f"agd(gain=...) takes one number, not an array of shape {np.shape(gain)}")
    if isinstance(gain, jax.core.Tracer):
        return
    # A schedule may end at zero, in an array. Who writes down a zero has made a mistake.
    smallest = math.ulp(0.0) if isinstance(gain, int | float) else 0.0
    if not smallest <= float(gain) < math.inf:
        raise ValueError(f"agd(gain={gain}): gain must be positive and finite; the default is 1.0")
