"""What is trained and how, before anything is computed: the network, the optimiser, the steps."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import optax
from jax.sharding import Mesh

from input_pipeline.batch import Batch
from training import sharding, state, step
from training.config import TrainConfig
from training.metrics import Metrics, TrainMetrics
from training.state import Arrays, Graph, Model, TrainState
from training.step import LOSSES, Loss

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, TrainMetrics]]
EvalStep = Callable[[Model, Batch], Metrics]
StatisticsStep = Callable[[Arrays, Arrays, Batch, jax.Array], Arrays]


class Plan(NamedTuple):
    """What is trained and how, before anything is computed.

    Attributes:
      config: the config of the run.
      mesh: the devices.
      graphdef: the static part of the network.
      tx: the optimiser.
      abstract_state: the shapes of the training state, with their shardings.
    """

    config: TrainConfig
    mesh: Mesh
    graphdef: Graph
    tx: optax.GradientTransformation
    abstract_state: TrainState

    @property
    def shardings(self) -> TrainState:
        """Where each array of the state is."""
        shardings: TrainState = jax.tree.map(lambda x: x.sharding, self.abstract_state)
        return shardings

    @property
    def train_step(self) -> TrainStep:
        """A training step, as a function of the state and a batch alone."""
        tx = self.tx
        if self.config.norm == "spectral":
            # It is to know how gradients are split, which only an explicit mesh says.
            specs = jax.tree.map(lambda sharding: sharding.spec, self.shardings)
            split = (specs.params, specs.opt_state, specs.params)
            tx = tx._replace(update=jax.sharding.explicit_axes(tx.update, in_sharding=split))

        def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, TrainMetrics]:
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                return step.train_step(self.graphdef, tx, self._loss, state, batch)

        return train_step

    @property
    def eval_step(self) -> EvalStep:
        """An evaluation step, likewise."""
        return functools.partial(step.eval_step, self.graphdef, self._loss)

    @property
    def statistics_step(self) -> StatisticsStep | None:
        """A step that takes statistics of BatchNorm, likewise, if they are taken."""
        if not (self.config.average and jax.tree.leaves(self.abstract_state.batch_stats)):
            return None
        return functools.partial(step.statistics_step, self.graphdef)

    @property
    def dtype(self) -> jax.typing.DTypeLike:
        """The dtype of images, losses and metrics."""
        dtype: jax.typing.DTypeLike = state.DTYPES[self.config.precision][1]
        return dtype

    @property
    def convolutional(self) -> bool:
        """Whether the network has convolutions."""
        return any(p.ndim == 4 for p in jax.tree.leaves(self.abstract_state.params))

    @property
    def _loss(self) -> Loss:
        return LOSSES[self.config.loss or self.config.spec.loss]

    def create_train_state(self) -> TrainState:
        """Makes the state that training starts from, on the mesh."""
        return state.create_train_state(self.config, self.tx, self.shardings)


def make_plan(config: TrainConfig, mesh: Mesh) -> Plan:
    """Plans what is trained on a mesh."""
    graphdef, *_ = state.abstract_network(config)
    tx = state.create_optimizer(config)
    return Plan(config, mesh, graphdef, tx, sharding.place(mesh, state.abstract_state(config, tx)))
