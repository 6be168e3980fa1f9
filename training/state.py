"""The training state: one pytree, made on the mesh by one compiled function."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import agd_jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a step changes.

    Attributes:
      step: number of steps taken, an int32 scalar.
      params: the network's parameters.
      batch_stats: its running averages, if it has any.
      opt_state: the optimiser's state.
    """

    step: jax.Array
    params: nnx.State
    batch_stats: nnx.State
    opt_state: optax.OptState


def create_state(
    make_model: Callable[[], nnx.Module],
    tx: optax.GradientTransformation,
    key: jax.Array,
    shardings: Callable[[TrainState], TrainState],
) -> tuple[nnx.GraphDef, TrainState]:
    """Splits a network once, into its graph definition and the arrays of a fresh state.

    Args:
      make_model: builds the network; its starting weights are replaced by orthogonal ones.
      tx: the optimiser.
      key: for the starting weights.
      shardings: gives how each array of a state is to be split, from their shapes.
    """

    def init(key: jax.Array) -> TrainState:
        _, params, batch_stats = nnx.split(make_model(), nnx.Param, nnx.BatchStat)
        params = agd_jax.orthogonal_init(key, params)
        return TrainState(jnp.zeros([], jnp.int32), params, batch_stats, tx.init(params))

    graphdef, _, _ = nnx.split(nnx.eval_shape(make_model), nnx.Param, nnx.BatchStat)
    return graphdef, jax.jit(init, out_shardings=shardings(jax.eval_shape(init, key)))(key)
