"""Automatic gradient descent as an Optax gradient transformation."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from agd_jax import geometry


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


def agd(gain: jax.typing.ArrayLike = 1.0) -> optax.GradientTransformationExtraArgs:
    r"""Automatic gradient descent: no learning rate, no schedule, no momentum, no state.

    With :math:`L` parameter tensors, the gradient :math:`g_{k,t}` of tap :math:`t` of tensor
    :math:`k` and its scale :math:`s_k` (see :mod:`agd_jax.geometry`), one step is

    .. math::
      G &= \frac{1}{L} \sum_k s_k \sum_t \|g_{k,t}\|_F \\
      \eta &= \log \frac{1 + \sqrt{1 + 4 G}}{2} \\
      W_{k,t} &\leftarrow W_{k,t}
        - \mathrm{gain} \, \frac{\eta}{L} \, s_k \, \frac{g_{k,t}}{\|g_{k,t}\|_F}

    A tap whose gradient is zero does not move. Start from :func:`agd_jax.orthogonal_init`, for
    which the analysis behind the step holds. Norms, ``G`` and ``eta`` are float32 (float64 for
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
      ValueError: if ``gain`` is a number that is not positive and finite. ``init`` raises one if
        the parameters are one bare vector, which is what ``optax.flatten`` makes of a network.

    References:
      Bernstein et al., *Automatic Gradient Descent: Deep Learning without Hyperparameters*,
      2023, https://arxiv.org/abs/2304.05187.
    """
    if isinstance(gain, int | float) and not 0 < gain < math.inf:
        raise ValueError(f"agd(gain={gain}): gain must be positive and finite; the default is 1.0")

    def init(params: optax.Params) -> AgdState:
        if getattr(params, "ndim", None) == 1:
            raise ValueError(
                f"agd() was given one bare vector of {params.size} numbers, in which it sees no "
                "matrices. Take optax.flatten away from around it; if the vector is a parameter "
                "of its own, put it into a container, as in {'w': vector}"
            )
        dtypes = [geometry.norm_dtype(p.dtype) for p in jax.tree.leaves(params)]
        zero = jnp.zeros([], jnp.result_type(jnp.float32, *dtypes))
        return AgdState(eta=zero, gradient_summary=zero)

    def update(
        updates: optax.Updates,
        state: AgdState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AgdState]:
        del extra_args  # Accepted, so that agd() may stand in a chain with others that use them.
        grads = jax.tree.leaves(updates)
        depth = max(len(grads), 1)
        gradient_summary = sum(map(geometry.dual_norm, grads)) / depth
        eta = automatic_learning_rate(gradient_summary)
        size = jnp.multiply(gain, eta) / depth

        def step(grad: jax.Array, param: jax.Array) -> jax.Array:
            return (-size * geometry.direction(grad)).astype(param.dtype)

        updates = jax.tree.map(step, updates, updates if params is None else params)
        # The state keeps its dtype when gradients have another one, so that it can be carried.
        dtype = state.eta.dtype
        return updates, AgdState(eta.astype(dtype), jnp.asarray(gradient_summary, dtype))

    return optax.GradientTransformationExtraArgs(init, update)
