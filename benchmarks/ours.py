"""A run of this project, as what `epoch.py`, `memory.py` and `resnet50.py` measure."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from input_pipeline.batch import Batch
from input_pipeline.resident import Arrays
from training import sharding
from training.config import TrainConfig
from training.data import load_data
from training.feeds import make_feed
from training.plan import make_plan

if TYPE_CHECKING:
    from input_pipeline.streaming import Sources


class Started:
    """A run at its start.

    Attributes:
      plan: what is trained and how.
      data: on the host.
      feed: the data, and the programs that use them.
      state: of the training.
    """

    def __init__(self, config: TrainConfig):
        config = config.resolved()
        self.plan = make_plan(config, sharding.make_mesh(config))
        self.data = self.load(config)
        self.feed = make_feed(self.plan, self.data)
        self.state = self.feed.compile(self.plan.create_train_state())

    def load(self, config: TrainConfig) -> Arrays | Sources:
        """The data of the config."""
        return load_data(config)


class Ours(Started):
    """A run on CIFAR-10, at its start.

    Attributes:
      spec: the data set.
    """

    def __init__(self, arch: str, batch_size: int, data_dir: str | None, precision: str = "f32"):
        super().__init__(
            TrainConfig(
                arch=arch,
                dataset="cifar10",
                data_dir=data_dir,
                train_bs=batch_size,
                test_bs=batch_size,
                precision=precision,
            )
        )
        self.spec = self.plan.config.spec
        self._step = jax.jit(self.plan.train_step, donate_argnums=0)

    def train(self, steps: int) -> None:
        """Takes steps of the run, as many as an epoch has or fewer."""
        # From the start of an epoch, wherever other steps left off.
        self.state = dataclasses.replace(self.state, step=jnp.zeros_like(self.state.step))
        self.state, _ = self.feed.train(self.state, self.feed.zero_metrics(), steps)
        jax.block_until_ready(self.state)

    def step(self, batch: Batch) -> float:
        """Takes a step on a batch; returns the loss before it."""
        self.state, measured = self._step(self.state, batch)
        return float(measured.sums.loss / measured.sums.examples)
