"""Noise in the place of ImageNet: what the devices can do when nothing has to be read."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from input_pipeline.batch import Batch
from input_pipeline.imagenet import Sources
from input_pipeline.specs import DatasetSpec
from input_pipeline.streaming import Streamed

# Batches in an epoch: enough to time, few enough to wait for.
TRAIN_BATCHES = 100
TEST_BATCHES = 10


class Noise(NamedTuple):
    """A split with nothing in it to be read."""

    size: int


def sources(train_bs: int, test_bs: int) -> Sources:
    """Splits of as many examples as the epochs have."""
    return Sources(Noise(TRAIN_BATCHES * train_bs), Noise(TEST_BATCHES * test_bs), classes=())


class NoiseStream:
    """One batch, already on the devices, over and over."""

    def __init__(self, spec: DatasetSpec, batch_size: int, sharding: jax.sharding.Sharding):
        """Draws the batch.

        Args:
          spec: gives the shape of the pictures and the number of classes.
          batch_size: number of examples, over all processes.
          sharding: of the batch over the devices.
        """

        def draw(key: jax.Array) -> Batch:
            shape = (batch_size, *spec.image_shape)
            images = jax.random.randint(key, shape, 0, 256, jnp.uint8)
            labels = jax.random.randint(key, (batch_size,), 0, spec.num_classes, jnp.int32)
            return Batch(images, labels, jnp.ones(batch_size, jnp.float32))

        batch = jax.jit(draw, out_shardings=sharding)(jax.random.key(0))
        self._element = Streamed(batch, unreadable=np.empty(0, np.int64))

    def __next__(self) -> Streamed:
        return self._element

    def start_prefetch(self) -> None:
        """It is there already."""

    def get_state(self) -> dict:
        """Every place is the same."""
        return {}

    def set_state(self, state: dict) -> None:
        """Every place is the same."""

    def close(self) -> None:
        """There is nothing to end."""
