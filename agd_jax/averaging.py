"""The average of the weights along a run, which is better than the last ones."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from agd_jax.geometry import norm_dtype

# The average reaches back over about this part of the steps so far: an eleventh.
PARTS = 10


class AverageState(NamedTuple):
    """The averaged weights.

    Attributes:
      steps: how many there were.
      average: a tree like the parameters, in float32 or float64.
      inner: the state of the optimiser that is wrapped.
    """

    steps: jax.Array
    average: optax.Params
    inner: Any


def averaged(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    r"""Averages the weights that an optimiser passes through, which it leaves as they are.

    After step :math:`t`, with the weights :math:`w_t` that the step led to,

    .. math:: a_t = a_{t-1} + \frac{11}{t + 10} (w_t - a_{t-1}),

    so that :math:`w_t` counts in proportion to about :math:`t^{10}`. The average reaches back over
    an eleventh of the steps so far, however many these are: any moment is a good one to stop, and
    nothing has to be known beforehand. It takes the noise out of the weights, as a learning rate
    that falls to zero would.

    >>> import agd_jax, jax.numpy as jnp, optax
    >>> tx = agd_jax.averaged(optax.sgd(1.0))
    >>> params = jnp.zeros(2)
    >>> opt_state = tx.init(params)
    >>> updates, opt_state = tx.update(jnp.ones(2), opt_state, params)
    >>> agd_jax.averaged_params(opt_state, params).tolist()
    [-1.0, -1.0]

    Args:
      tx: any Optax optimiser, as a whole: what changes its updates belongs inside.

    Returns:
      An Optax gradient transformation with the same updates, whose state is an
      :class:`AverageState`. Its ``update`` needs ``params``.
    """
    tx = optax.with_extra_args_support(tx)

    def init(params: optax.Params) -> AverageState:
        wide = lambda p: jnp.array(p, norm_dtype(jnp.result_type(p)))
        return AverageState(jnp.zeros([], jnp.int32), jax.tree.map(wide, params), tx.init(params))

    def update(
        updates: optax.Updates,
        state: AverageState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AverageState]:
        if params is None:
            raise ValueError("averaged() needs the parameters: tx.update(grads, state, params)")
        updates, inner = tx.update(updates, state.inner, params, **extra_args)
        steps = optax.safe_increment(state.steps)
        share = (PARTS + 1) / (PARTS + steps.astype(jnp.float32))

        def nearer(average: jax.Array, param: jax.Array, update: jax.Array) -> jax.Array:
            moved = share.astype(average.dtype) * (param + update - average)
            return jnp.add(average, moved)

        average = jax.tree.map(nearer, state.average, params, updates)
        return updates, AverageState(steps, average, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def averaged_params(opt_state: Any, params: optax.Params) -> optax.Params:
    """Returns the averaged weights.

    Args:
      opt_state: the state of an optimiser in which :func:`averaged` is, on whatever level.
      params: the parameters, for their dtypes.

    Raises:
      ValueError: if :func:`averaged` is not in it.
    """
    average = optax.tree.get(opt_state, "average")
    if average is None:
        raise ValueError("there are no averaged weights in this state: averaged() did not make it")
    return jax.tree.map(lambda a, p: a.astype(jnp.result_type(p)), average, params)
