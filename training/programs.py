"""The compiled programs of a run over resident data: many steps in one dispatch."""

from collections.abc import Callable

import jax
from jax.sharding import Mesh

from input_pipeline import resident
from input_pipeline.resident import Batch
from input_pipeline.sources import Arrays, Split
from input_pipeline.specs import DatasetSpec
from training import metrics, sharding
from training.metrics import Metrics, TrainMetrics
from training.state import TrainState


class Programs:
    """Everything that runs on the devices, each method one dispatch of a compiled program.

    XLA's CPU backend runs the operations in a loop whose length it knows on one thread, and
    those in a loop until an argument on all of them. So lengths are arguments here, and one
    program serves every length. The data are arguments too: captured, they would be constants
    of the program.

    Attributes:
      steps_per_epoch: full batches in the training set.
    """

    def __init__(
        self,
        spec: DatasetSpec,
        data: Arrays,
        *,
        train_step: Callable[[TrainState, Batch], tuple[TrainState, TrainMetrics]],
        eval_step: Callable[[TrainState, Batch], Metrics],
        key: jax.Array,
        train_bs: int,
        test_bs: int,
        dtype: jax.typing.DTypeLike,
        mesh: Mesh,
    ):
        """Builds the programs; each compiles when first called.

        Args:
          spec: the data set.
          data: its arrays, on the host.
          train_step: as in :mod:`training.step`, without the static arguments.
          eval_step: likewise.
          key: for shuffling and augmentation.
          train_bs: examples in a training batch.
          test_bs: examples in a test batch.
          dtype: of the pictures that the network is given, and of the metrics.
          mesh: of the devices, which each hold the data, and share the examples of a batch.
        """
        self.steps_per_epoch = len(data.train.labels) // train_bs
        self._eval_steps = -(-len(data.test.labels) // test_bs)
        everywhere, over_batch = sharding.replicated(mesh), sharding.over_batch(mesh)
        self._data = jax.device_put(data, everywhere)
        self._no_metrics = jax.device_put(metrics.no_train_metrics(dtype), everywhere)
        self._shuffle_key, self._augment_key = jax.random.split(key)

        def shuffle(key: jax.Array, epoch: jax.Array) -> jax.Array:
            return resident.epoch_order(key, epoch, len(data.train.labels))

        def train(
            state: TrainState,
            sums: TrainMetrics,
            split: Split,
            order: jax.Array,
            key: jax.Array,
            stop: jax.Array,
        ) -> tuple[TrainState, TrainMetrics]:
            def unfinished(carry):
                state, sums = carry
                return (state.step < stop) & jax.numpy.isfinite(sums.sums.loss)

            def step(carry):
                state, sums = carry
                index = state.step % self.steps_per_epoch
                batch_key = jax.random.fold_in(key, state.step)
                batch = resident.train_batch(spec, split, order, index, batch_key, train_bs, dtype)
                batch = jax.lax.with_sharding_constraint(batch, over_batch)
                state, measured = train_step(state, batch)
                return state, metrics.add_train(sums, measured)

            return jax.lax.while_loop(unfinished, step, (state, sums))

        def evaluate(state: TrainState, split: Split, stop: jax.Array) -> Metrics:
            def step(index, sums):
                batch = resident.eval_batch(spec, split, index, test_bs, dtype)
                batch = jax.lax.with_sharding_constraint(batch, over_batch)
                return metrics.add(sums, eval_step(state, batch))

            return jax.lax.fori_loop(0, stop, step, metrics.no_metrics(dtype))

        self._shuffle = jax.jit(shuffle, out_shardings=everywhere)
        self._train = jax.jit(train, donate_argnums=0, out_shardings=everywhere)
        self._evaluate = jax.jit(evaluate, out_shardings=everywhere)

    def compile(self, state: TrainState) -> TrainState:
        """Compiles everything, so that no epoch is timed with it. The state is donated."""
        order = self.shuffle(0)
        # Both loops end where they start: these calls compile, and take no step.
        state, _ = self.train(state, self._no_metrics, order, 0)
        self._evaluate(state, self._data.test, 0)
        return jax.block_until_ready(state)

    def no_metrics(self) -> TrainMetrics:
        """What an epoch's sums start from."""
        return self._no_metrics

    def shuffle(self, epoch: int) -> jax.Array:
        """The order of the training examples in an epoch."""
        return self._shuffle(self._shuffle_key, epoch)

    def train(
        self, state: TrainState, sums: TrainMetrics, order: jax.Array, stop: int
    ) -> tuple[TrainState, TrainMetrics]:
        """Takes steps until ``state.step`` is ``stop`` or the loss is no longer finite.

        Args:
          state: donated, so not to be used again.
          sums: metrics of the epoch so far.
          order: of the epoch, from :meth:`shuffle`.
          stop: a step of this epoch, or the first of the next.
        """
        return self._train(state, sums, self._data.train, order, self._augment_key, stop)

    def evaluate(self, state: TrainState) -> Metrics:
        """Metrics over the whole test set, each example counted once."""
        return self._evaluate(state, self._data.test, self._eval_steps)
