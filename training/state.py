"""The network and the training state, a pytree that one compiled function makes on the mesh."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

import models

if TYPE_CHECKING:
    import optax

    from agd_jax import Geometry
    from agd_jax.optimizer import Norm
    from training.config import TrainConfig

# The static part of a network, and a tree of its arrays.
Graph = nnx.GraphDef[nnx.Module]
Arrays = nnx.State[Any, Any]
# All arrays of a network, as a checkpoint has them: {"params": ..., "batch_stats": ...}.
Model = dict[str, Arrays]

# --precision -> (dtype of the network's arithmetic, dtype of everything else).
DTYPES = {
    "f32": (jnp.float32, jnp.float32),
    "bf16": (jnp.bfloat16, jnp.float32),
    "f64": (jnp.float64, jnp.float64),
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a training step changes.

    Attributes:
      step: the number of steps taken, an int32 scalar.
      params: the network's parameters.
      batch_stats: the network's running averages, if any.
      opt_state: the optimiser's state.
    """

    step: jax.Array
    params: Arrays
    batch_stats: Arrays
    opt_state: optax.OptState

    @property
    def model(self) -> Model:
        """The arrays of the network alone."""
        return {"params": self.params, "batch_stats": self.batch_stats}

    @property
    def averaged(self) -> Model | None:
        """The averaged weights, if there are any, with the running averages of the plain ones."""
        import agd_jax
        from agd_jax.averaging import AverageState

        if not isinstance(self.opt_state, AverageState):
            return None
        params = agd_jax.averaged_params(self.opt_state, self.params)
        return {"params": params, "batch_stats": self.batch_stats}


def create_network(config: TrainConfig) -> nnx.Module:
    """Builds the network of a config, with Flax's own initial weights."""
    dtype, param_dtype = DTYPES[config.precision]
    return models.create(
        config.arch,
        config.spec.image_shape,
        config.spec.num_classes,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=nnx.Rngs(0),
        **{name: getattr(config, name) for name in models.ARCHITECTURES[config.arch].options},
    )


def abstract_network(config: TrainConfig) -> tuple[Graph, Arrays, Arrays]:
    """Returns the static part of the network, and the shapes of its parameters and averages."""
    return split(nnx.eval_shape(lambda: create_network(config)))


def split(model: nnx.Module) -> tuple[Graph, Arrays, Arrays]:
    """Splits a network into its static part, its parameters and its running averages."""
    graphdef, params, *rest = nnx.split(model, nnx.Param, nnx.BatchStat)
    (batch_stats,) = rest
    return graphdef, params, batch_stats


def geometry_of(graph: Graph, params: Arrays, batch_stats: Arrays, images: Any) -> Geometry:
    """Returns how a network uses its parameters, from shapes or arrays; computes nothing."""
    import agd_jax  # Here, as loading a trained network does not need it.

    def apply(params: Arrays, batch_stats: Arrays, images: jax.Array) -> jax.Array:
        model = nnx.merge(graph, params, batch_stats, copy=True)
        model.train()
        results: jax.Array = model(images)
        return results

    return agd_jax.geometry_of(apply, params, batch_stats, images)


def create_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Builds the optimiser of a config."""
    import agd_jax

    geometry = _geometry(config)
    if config.norm == "frobenius" and models.ARCHITECTURES[config.arch].paper:
        geometry = geometry.by_tensors()
    tx = agd_jax.agd(geometry=geometry, norm=cast("Norm", config.norm), gain=config.gain)
    return agd_jax.averaged(tx) if config.average else tx


@functools.lru_cache(1)
def _geometry(config: TrainConfig) -> Geometry:
    """Returns how the network of a config uses its parameters."""
    dtype, _ = DTYPES[config.precision]
    # As many examples as BatchNorm takes together.
    shape = (config.bn_group or 2, *config.spec.image_shape)
    return geometry_of(*abstract_network(config), jax.ShapeDtypeStruct(shape, dtype))


def abstract_state(config: TrainConfig, tx: optax.GradientTransformation) -> TrainState:
    """Returns the shapes of the training state, as a tree of :class:`jax.ShapeDtypeStruct`."""
    shapes: TrainState = jax.eval_shape(_maker(config, tx), jax.random.key(config.seed))
    return shapes


def create_train_state(
    config: TrainConfig, tx: optax.GradientTransformation, shardings: TrainState
) -> TrainState:
    """Makes the initial training state, with orthogonal weights drawn from the seed.

    Args:
      config: the config of the run.
      tx: the optimiser.
      shardings: the sharding of each array, as a state of :class:`jax.sharding.Sharding`.
    """
    make = jax.jit(_maker(config, tx), out_shardings=shardings)
    state: TrainState = make(jax.random.key(config.seed))
    return state


def _maker(
    config: TrainConfig, tx: optax.GradientTransformation
) -> Callable[[jax.Array], TrainState]:
    import agd_jax

    geometry = _geometry(config)

    def make(key: jax.Array) -> TrainState:
        _, params, batch_stats = split(create_network(config))
        params = agd_jax.orthogonal_init(key, params, geometry)
        return TrainState(jnp.zeros([], jnp.int32), params, batch_stats, tx.init(params))

    return make
