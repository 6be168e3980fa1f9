"""What every feed of training data has."""

from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np

from training import metrics, sharding
from training.metrics import Metrics, TrainMetrics
from training.plan import Plan
from training.signals import Request
from training.state import Model, TrainState

# How many training images the statistics of BatchNorm are taken of, at least a batch.
STATISTICS_IMAGES = 4096


class Stalled(Exception):  # noqa: N818, nothing went wrong
    """Data do not come, and the run is asked to end.

    Attributes:
      reached: the training state, the metrics of the epoch and the step so far, if training.
    """

    reached: tuple[TrainState, TrainMetrics, int]


class Feed(Protocol):
    """The interface between a data set and the loop over epochs.

    Attributes:
      steps_per_epoch: the number of full batches in the training set.
      request: whether the run is asked to end. Then the feed does not wait for data that do not
        come.
    """

    steps_per_epoch: int
    request: Request

    def compile(self, state: TrainState) -> TrainState:
        """Compiles every program, to keep that time out of the epochs. The state is donated."""

    def zero_metrics(self) -> TrainMetrics:
        """Returns the zero sums that an epoch starts from, on the devices."""

    def train(
        self, state: TrainState, sums: TrainMetrics, stop: int
    ) -> tuple[TrainState, TrainMetrics]:
        """Takes steps until ``state.step`` is ``stop``.

        Args:
          state: the training state, which is donated: do not use it again.
          sums: the metrics of the epoch so far.
          stop: a step of this epoch, or the first step of the next.

        Raises:
          DataError: if the data can no longer be read.
          Stalled: if they do not come, and the run is asked to end.
        """

    def evaluate(self, models: Sequence[Model]) -> list[Metrics]:
        """Returns the metrics of each network on the test set, each example counted once.

        Raises:
          DataError: if the data can no longer be read.
          Stalled: if they do not come, and the run is asked to end.
        """

    def with_statistics(self, model: Model) -> Model:
        """Returns a copy of a network in which BatchNorm has statistics of its own.

        These are means over batches of training images, the same ones each time, spread evenly over
        the training set, and seen as test images are.

        Raises:
          DataError: if the data can no longer be read.
          Stalled: if they do not come, and the run is asked to end.
        """

    def iterator_state(self) -> dict[str, Any]:
        """Returns the position in the training data after the last step, as JSON values."""

    def restore(self, iterator_state: dict[str, Any], step: int) -> None:
        """Goes to a position from :meth:`iterator_state`, saved after step number ``step``."""

    def unreadable(self, trained: Metrics, tested: Metrics) -> int | None:
        """Returns the number of unreadable images in an epoch and its evaluation, if applicable."""

    def close(self) -> None:
        """Stops the background work of the feed."""


class OnMesh:
    """Holds what both kinds of feed have on the mesh: shardings, and the sums over no example."""

    def __init__(self, plan: Plan):
        self.request = Request()
        self._everywhere = sharding.replicated(plan.mesh)
        self._over_batch = sharding.over_batch(plan.mesh)
        zeros = lambda: (metrics.zero_train_metrics(plan.dtype), metrics.zero_metrics(plan.dtype))
        # Not device_put, which leaves a process that has one device without its share of arrays
        # that are on devices already (JAX 0.10.1 to 0.12).
        make = jax.jit(zeros, out_shardings=self._everywhere)
        self._zero_metrics: TrainMetrics
        self._zero_eval_metrics: Metrics
        self._zero_metrics, self._zero_eval_metrics = make()

    def zero_metrics(self) -> TrainMetrics:
        """Returns the zero sums that an epoch starts from."""
        return self._zero_metrics


def statistics_images(size: int, batch_size: int) -> np.ndarray:
    """Returns the numbers of the training images that BatchNorm's statistics are taken of.

    Args:
      size: the size of the training set.
      batch_size: the size of the batches, which these images fill.
    """
    count = max(1, min(STATISTICS_IMAGES, size) // batch_size) * batch_size
    return np.arange(count) * size // count
