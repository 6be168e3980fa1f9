"""A run whose data come from the host: one dispatch a step, the next batch already there."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from input_pipeline.batch import Batch, normalise
from input_pipeline.imagenet import Source
from input_pipeline.specs import DatasetSpec
from training import metrics, sharding
from training.metrics import Metrics, TrainMetrics
from training.state import TrainState

if TYPE_CHECKING:
    import grain

log = logging.getLogger(__name__)


class StreamedRun:
    """Trains and tests on batches that arrive while the step before them is taken.

    Attributes:
      steps_per_epoch: full batches in the training set.
    """

    def __init__(
        self,
        spec: DatasetSpec,
        train: grain.DatasetIterator,
        test: grain.DatasetIterator,
        sources: tuple[Source, Source],
        *,
        train_step: Callable[[TrainState, Batch], tuple[TrainState, TrainMetrics]],
        eval_step: Callable[[TrainState, Batch], Metrics],
        train_bs: int,
        test_bs: int,
        dtype: jax.typing.DTypeLike,
        mesh: Mesh,
        shardings: TrainState,
    ):
        """Builds the programs; they compile in :meth:`compile`.

        Args:
          spec: the data set.
          train: its training batches, from :func:`input_pipeline.streaming.train_stream`.
          test: its test batches, likewise.
          sources: of both, to name their records.
          train_step: as in :mod:`training.step`, without the static arguments.
          eval_step: likewise.
          train_bs: examples in a training batch.
          test_bs: examples in a test batch.
          dtype: of the pictures that the network is given, and of the metrics.
          mesh: of the devices, which share the examples of a batch.
          shardings: of the state.
        """
        self.steps_per_epoch = sources[0].size // train_bs
        self._eval_steps = -(-sources[1].size // test_bs)
        self._spec, self._sources = spec, sources
        self._train, self._test = train, test
        self._batch_sizes = train_bs, test_bs
        self._over_batch = sharding.over_batch(mesh)
        everywhere = sharding.replicated(mesh)
        self._no_metrics = sharding.make(everywhere, lambda: metrics.no_train_metrics(dtype))
        self._no_eval_metrics = sharding.make(everywhere, lambda: metrics.no_metrics(dtype))
        self._steps_taken = 0
        self._reported: set[str] = set()

        def prepared(batch: Batch) -> Batch:
            images = normalise(spec, batch.images, dtype)
            return Batch(images, batch.labels, batch.weights.astype(dtype))

        def step(
            state: TrainState, sums: TrainMetrics, batch: Batch
        ) -> tuple[TrainState, TrainMetrics]:
            state, measured = train_step(state, prepared(batch))
            return state, metrics.add_train(sums, measured)

        def score(state: TrainState, sums: Metrics, batch: Batch) -> Metrics:
            return metrics.add(sums, eval_step(state, prepared(batch)))

        self._step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, everywhere))
        self._score = jax.jit(score, out_shardings=everywhere)

    def compile(self, state: TrainState) -> TrainState:
        """Compiles both programs, while the first batches are being decoded."""
        self._train.start_prefetch()
        self._test.start_prefetch()
        train, test = (self._batch_like(size) for size in self._batch_sizes)
        self._step = self._step.lower(state, self._no_metrics, train).compile()
        self._score = self._score.lower(state, self._no_eval_metrics, test).compile()
        return jax.block_until_ready(state)

    def no_metrics(self) -> TrainMetrics:
        """What an epoch's sums start from."""
        return self._no_metrics

    def train(
        self, state: TrainState, sums: TrainMetrics, stop: int
    ) -> tuple[TrainState, TrainMetrics]:
        """Takes steps until there have been ``stop``.

        Args:
          state: donated, so not to be used again.
          sums: metrics of the epoch so far.
          stop: a step of this epoch, or the first of the next.
        """
        for _ in range(stop - self._steps_taken):
            batch, unreadable = next(self._train)
            self._report(self._sources[0], unreadable)
            state, sums = self._step(state, sums, batch)
        self._steps_taken = stop
        return state, sums

    def evaluate(
        self, state: TrainState, interrupted: Callable[[], bool] = lambda: False
    ) -> Metrics | None:
        """Metrics over the whole test set, each example counted once; None if interrupted.

        The test pictures do not begin again after an interruption.
        """
        sums = self._no_eval_metrics
        for _ in range(self._eval_steps):
            if interrupted():
                return None
            batch, unreadable = next(self._test)
            self._report(self._sources[1], unreadable)
            sums = self._score(state, sums, batch)
        return sums

    def position(self) -> dict:
        """The place in the training data after the last step, as JSON has it."""
        return self._train.get_state()

    def restore(self, position: dict, step: int) -> None:
        """Goes to a place that :meth:`position` gave, after step number ``step``."""
        self._train.set_state(position)
        self._steps_taken = step

    def counts(self, trained: Metrics, tested: Metrics) -> dict[str, int]:
        """How many pictures of an epoch and its test could not be read, by any process."""
        expected = self.steps_per_epoch * self._batch_sizes[0] + self._sources[1].size
        return {"unreadable": round(expected - float(trained.examples) - float(tested.examples))}

    def close(self) -> None:
        """Ends the worker processes."""
        self._train.close()
        self._test.close()
        # Frames of the threads that have ended hold Grain's shared memory, in cycles.
        gc.collect()

    def _batch_like(self, size: int) -> Batch:
        def like(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((size, *shape), dtype, sharding=self._over_batch)

        images = like(self._spec.image_shape, jnp.uint8)
        return Batch(images, like((), jnp.int32), like((), jnp.float32))

    def _report(self, source: Source, unreadable: np.ndarray) -> None:
        """Names each picture that could not be read, once."""
        for name in sorted({source.name(int(index)) for index in unreadable} - self._reported):
            log.warning("left out, as it cannot be read: %s", name)
            self._reported.add(name)
