"""Automatic gradient descent as an Optax gradient transformation."""

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from agd_jax import geometry, names

P = ParamSpec("P")
T = TypeVar("T")

# A tensor is left where it is if its share of the gradient summary is less than so many units of
# rounding. In float32, noise was measured to have up to 5. The smallest gradients that mean
# something, of queries' biases in transformers that start with almost no attention, had 500, and 40
# in the first steps of a deep one; those wait for a while, for next to nothing is lost by it.
ROUNDING_UNITS = 64


class AgdState(NamedTuple):
    """What the last step found. Nothing in here enters the next one: it is kept for logs.

    Attributes:
      eta: the automatic learning rate, a scalar (zero before the first step).
      gradient_summary: the gradient summary ``G``, a scalar (zero before the first step).
    """

    eta: jax.Array
    gradient_summary: jax.Array


def automatic_learning_rate(gradient_summary: jax.typing.ArrayLike) -> jax.Array:
    r"""The step size that a gradient summary asks for.

    .. math:: \eta = \log \frac{1 + \sqrt{1 + 4 G}}{2}

    is the minimum over :math:`\eta` of :math:`-\eta G + (e^\eta - 1)^2 / 2`, which bounds the
    change of the loss. It is computed as ``log1p(2 G / (1 + sqrt(1 + 4 G)))``, the same number
    without the cancellation that would round the eta of a small ``G`` to zero.

    >>> float(automatic_learning_rate(0.0))
    0.0
    """
    g = jnp.asarray(gradient_summary)
    return jnp.log1p(2 * g / (1 + jnp.sqrt(1 + 4 * g)))


def _without_learning_rate(make: Callable[P, T]) -> Callable[P, T]:
    """Answers ``agd(1e-3)`` by what to write, where Python would only count arguments."""

    @functools.wraps(make)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        if args or "learning_rate" in kwargs:
            raise TypeError(
                "agd() has no learning rate: where optax.adam(1e-3) stood, write agd(). Its only "
                "argument is a factor for every update, given by name, as in agd(gain=1.0)"
            )
        return make(*args, **kwargs)

    return checked


@_without_learning_rate
def agd(*, gain: jax.typing.ArrayLike = 1.0) -> optax.GradientTransformationExtraArgs:
    r"""Automatic gradient descent: no learning rate, no schedule, no momentum, no state.

    With :math:`L` parameter tensors, the gradient :math:`g_{k,t}` of tap :math:`t` of tensor
    :math:`k` and its scale :math:`s_k` (see :mod:`agd_jax.geometry`), one step is

    .. math::
      G &= \frac{1}{L} \sum_k s_k \sum_t \|g_{k,t}\|_F \\
      \eta &= \log \frac{1 + \sqrt{1 + 4 G}}{2} \\
      W_{k,t} &\leftarrow W_{k,t}
        - \mathrm{gain} \, \frac{\eta}{L} \, s_k \, \frac{g_{k,t}}{\|g_{k,t}\|_F}

    A tap whose gradient is zero does not move. Start from :func:`agd_jax.orthogonal_init`, for
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

    Norms, ``G`` and ``eta`` are float32 (float64 for
    float64 gradients), whatever the dtype of the gradients; updates have the dtype of the
    parameters, or of the gradients where ``params`` is not given.

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
      gain: multiplies every update. The method has no such number; 10 is an experiment some
        like to make.

    Returns:
      An Optax gradient transformation whose state is an :class:`AgdState`.

    Raises:
      TypeError: if a learning rate is given, which AGD does not have, or if ``gain`` is a
        schedule: Optax makes one of it, ``optax.inject_hyperparams(agd)(gain=schedule)``.
      ValueError: if ``gain`` is a number that is not positive and finite, or an array that is
        known to be negative or not finite, or not a scalar.

    Warns:
      UserWarning: by ``init``, if the parameters are one bare vector, which is what
        ``optax.flatten`` makes of a network.

    References:
      Bernstein et al., *Automatic Gradient Descent: Deep Learning without Hyperparameters*,
      2023, https://arxiv.org/abs/2304.05187.
    """
    _check_gain(gain)

    def init(params: optax.Params) -> AgdState:
        if getattr(params, "ndim", None) == 1:
            warnings.warn(
                f"agd() was given one bare vector of {params.size} numbers, in which it sees no "
                "matrices. If these are the parameters of a network, take optax.flatten away from "
                "around it",
                stacklevel=2,
            )
        names.warn_of_misread_axes(params)
        dtypes = [geometry.norm_dtype(jnp.result_type(p)) for p in jax.tree.leaves(params)]
        dtype = jnp.result_type(jnp.float32, *dtypes)
        # Two arrays, as one that is there twice cannot be donated.
        return AgdState(eta=jnp.zeros([], dtype), gradient_summary=jnp.zeros([], dtype))

    def update(
        updates: optax.Updates,
        state: AgdState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AgdState]:
        del extra_args  # Accepted, so that agd() may stand in a chain with others that use them.
        updates = jax.tree.map(jnp.asarray, updates)  # Python's floats are gradients too.
        dual_norms = jax.tree.map(geometry.dual_norm, updates)
        terms = jax.tree.leaves(dual_norms)
        depth = max(len(terms), 1)
        total = sum(terms, start=jnp.zeros([], jnp.float32))
        gradient_summary = total / depth
        eta = automatic_learning_rate(gradient_summary)
        size = jnp.multiply(gain, eta) / depth

        def step(grad: jax.Array, dual_norm: jax.Array, param: jax.typing.ArrayLike) -> jax.Array:
            floor = ROUNDING_UNITS * np.finfo(dual_norm.dtype).eps * total
            # Not `>= floor`, of which infinite and NaN gradients would make zeros.
            move = jnp.where(dual_norm < floor, 0, size)
            return (-move * geometry.direction(grad)).astype(jnp.result_type(param))

        updates = jax.tree.map(step, updates, dual_norms, updates if params is None else params)
        # The state keeps its dtype when gradients have another one, so that it can be carried.
        dtype = state.eta.dtype
        return updates, AgdState(eta.astype(dtype), jnp.asarray(gradient_summary, dtype))

    return optax.GradientTransformationExtraArgs(init, update)


def _check_gain(gain: Any) -> None:
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
