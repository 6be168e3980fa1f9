"""A run of this project, as what `epoch.py` and `memory.py` measure."""

import dataclasses

import jax
import jax.numpy as jnp

from input_pipeline.batch import Batch
from training import run, sharding
from training.config import TrainConfig


class Ours:
    """A run on CIFAR-10, at its start.

    Attributes:
      spec: the data set.
      data: its arrays, on the host.
      state: of the training.
    """

    def __init__(self, arch: str, batch_size: int, data_dir: str | None, precision: str = "f32"):
        config = TrainConfig(
            arch=arch,
            dataset="cifar10",
            data_dir=data_dir,
            train_bs=batch_size,
            test_bs=batch_size,
            precision=precision,
        ).resolved()
        plan = run.make_plan(config, sharding.make_mesh(config))
        self.spec, self.data = config.spec, run.load_data(config)
        self.feed = run.make_feed(plan, self.data)
        self.state = self.feed.compile(plan.create_train_state())
        self._step = jax.jit(plan.train_step, donate_argnums=0)

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
