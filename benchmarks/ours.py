"""A run of this project, as what `epoch.py` and `memory.py` measure."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

import agd_jax
from input_pipeline.batch import Batch
from training import loop, sharding
from training.config import TrainConfig
from training.losses import LOSSES
from training.step import train_step


class Ours:
    """A run on CIFAR-10, at its start.

    Attributes:
      spec: the data set.
      data: its arrays, on the host.
      state: of the training.
    """

    def __init__(self, arch: str, batch_size: int, data_dir: str | None):
        config = TrainConfig(
            arch=arch,
            dataset="cifar10",
            data_dir=data_dir,
            train_bs=batch_size,
            test_bs=batch_size,
        ).resolved()
        mesh = sharding.make_mesh(config)
        self.spec, self.data = config.spec, loop.load_data(config)
        plan = loop.build_plan(config, mesh)
        self.run = loop.build_run(config, mesh, self.data, plan)
        self.state = self.run.compile(plan.init())
        step = functools.partial(train_step, plan.graphdef, agd_jax.agd(), LOSSES[config.loss])
        self._step = jax.jit(step, donate_argnums=0)

    def train(self, steps: int) -> None:
        """Takes steps of the run, as many as an epoch has or fewer."""
        # From the start of an epoch, wherever other steps left off.
        self.state = dataclasses.replace(self.state, step=jnp.zeros_like(self.state.step))
        self.state, _ = self.run.train(self.state, self.run.no_metrics(), steps)
        jax.block_until_ready(self.state)

    def step(self, batch: Batch) -> float:
        """Takes a step on a batch; returns the loss before it."""
        self.state, measured = self._step(self.state, batch)
        return float(measured.sums.loss / measured.sums.examples)
