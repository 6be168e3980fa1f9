"""The training state: one pytree, made on the mesh by one compiled function."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

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


class Plan(NamedTuple):
    """A network split once into what is static and what changes, and how to begin.

    Attributes:
      graphdef: the static part; ``nnx.merge(graphdef, params, batch_stats)`` is the network.
      shapes: a state of ``jax.ShapeDtypeStruct`` with their shardings.
      init: makes the state that training starts from, on the mesh.
    """

    graphdef: nnx.GraphDef
    shapes: TrainState
    init: Callable[[], TrainState]


def plan_state(
    make_model: Callable[[], nnx.Module],
    tx: optax.GradientTransformation,
    key: jax.Array,
    shardings: Callable[[TrainState], TrainState],
) -> Plan:
    """Plans the state of a network, of which nothing is computed before ``init`` is called.

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
    shapes = jax.eval_shape(init, key)
    split = shardings(shapes)
    with_sharding = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    make = jax.jit(init, out_shardings=split)
    return Plan(graphdef, jax.tree.map(with_sharding, shapes, split), lambda: make(key))
