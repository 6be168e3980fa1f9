"""A run whose data live on the devices: many steps in one dispatch, where that is faster."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from input_pipeline import resident
from input_pipeline.batch import Batch
from input_pipeline.sources import Arrays, Split
from input_pipeline.specs import DatasetSpec
from training import metrics, sharding
from training.metrics import Metrics, TrainMetrics
from training.state import TrainState


class ResidentRun:
    """Trains and tests on data that each device holds, with the batches made inside jit.

    XLA's CPU backend runs a loop whose length it knows on one thread, and one until an argument
    on all of them. So lengths are arguments here, and one program serves every length. But its
    convolutions have one thread in any loop; networks that have some take their steps one by one
    on a CPU. The data are arguments too: captured, they would be constants of the program.

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
        shardings: TrainState,
        convolutional: bool,
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
          shardings: of the state.
          convolutional: whether the network has convolutions.
        """
        self.steps_per_epoch = len(data.train.labels) // train_bs
        self._eval_steps = -(-len(data.test.labels) // test_bs)
        everywhere, over_batch = sharding.replicated(mesh), sharding.over_batch(mesh)
        # Each process has all of the data, and gives its own devices what they are to hold.
        place = lambda x: jax.make_array_from_process_local_data(everywhere, x, x.shape)
        self._train, self._test = jax.tree.map(place, (data.train, data.test))
        self._no_metrics = sharding.make(everywhere, lambda: metrics.no_train_metrics(dtype))
        self._no_eval_metrics = sharding.make(everywhere, lambda: metrics.no_metrics(dtype))
        self._shuffle_key, self._augment_key = jax.random.split(key)
        self._epoch, self._order = None, None
        self._one_by_one = convolutional and mesh.devices.flat[0].platform == "cpu"

        def shuffle(key: jax.Array, epoch: jax.Array) -> jax.Array:
            return resident.epoch_order(key, epoch, len(data.train.labels))

        def step(
            state: TrainState, sums: TrainMetrics, split: Split, order: jax.Array, key: jax.Array
        ) -> tuple[TrainState, TrainMetrics]:
            index = state.step % self.steps_per_epoch
            batch_key = jax.random.fold_in(key, state.step)
            batch = resident.train_batch(spec, split, order, index, batch_key, train_bs, dtype)
            batch = jax.lax.with_sharding_constraint(batch, over_batch)
            state, measured = train_step(state, batch)
            return state, metrics.add_train(sums, measured)

        def steps(state, sums, split, order, key, stop):
            return jax.lax.while_loop(
                lambda carry: _unfinished(*carry, stop),
                lambda carry: step(*carry, split, order, key),
                (state, sums),
            )

        def score(state: TrainState, sums: Metrics, split: Split, index: jax.Array) -> Metrics:
            batch = resident.eval_batch(spec, split, index, test_bs, dtype)
            batch = jax.lax.with_sharding_constraint(batch, over_batch)
            return metrics.add(sums, eval_step(state, batch))

        def scores(state, sums, split, stop):
            return jax.lax.fori_loop(
                0, stop, lambda index, sums: score(state, sums, split, index), sums
            )

        self._shuffle = jax.jit(shuffle, out_shardings=everywhere)
        self._step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, everywhere))
        self._steps = jax.jit(steps, donate_argnums=0, out_shardings=(shardings, everywhere))
        self._score = jax.jit(score, out_shardings=everywhere)
        self._scores = jax.jit(scores, out_shardings=everywhere)

    def compile(self, state: TrainState) -> TrainState:
        """Compiles everything, so that no epoch is timed with it. The state is donated."""
        order, sums = self._order_of(0), self._no_metrics
        train, test = self._train, self._test
        if self._one_by_one:
            # There is no calling a step without taking it: a copy of the state takes it.
            self._step(jax.tree.map(jnp.copy, state), sums, train, order, self._augment_key)
            self._score(state, self._no_eval_metrics, test, 0)
        else:
            # Loops that end where they start.
            state, _ = self._steps(state, sums, train, order, self._augment_key, 0)
            self._scores(state, self._no_eval_metrics, test, 0)
        return jax.block_until_ready(state)

    def no_metrics(self) -> TrainMetrics:
        """What an epoch's sums start from."""
        return self._no_metrics

    def train(
        self, state: TrainState, sums: TrainMetrics, stop: int
    ) -> tuple[TrainState, TrainMetrics]:
        """Takes steps until ``state.step`` is ``stop`` or one is not finite.

        Args:
          state: donated, so not to be used again.
          sums: metrics of the epoch so far.
          stop: a step of this epoch, or the first of the next.
        """
        order = self._order_of((stop - 1) // self.steps_per_epoch)
        if not self._one_by_one:
            return self._steps(state, sums, self._train, order, self._augment_key, stop)
        # Waiting for each step costs nothing where the device is the host.
        while _unfinished(state, sums, stop):
            state, sums = self._step(state, sums, self._train, order, self._augment_key)
        return state, sums

    def evaluate(
        self, state: TrainState, interrupted: Callable[[], bool] = lambda: False
    ) -> Metrics | None:
        """Metrics over the whole test set, each example counted once; None if interrupted."""
        sums, test = self._no_eval_metrics, self._test
        if not self._one_by_one:
            return self._scores(state, sums, test, self._eval_steps)
        for index in range(self._eval_steps):
            if interrupted():
                return None
            sums = self._score(state, sums, test, index)
        return sums

    def position(self) -> dict:
        """Nothing: the place in the data follows from the step."""
        return {}

    def restore(self, position: dict, step: int) -> None:
        """There is nothing to do."""

    def counts(self, trained: Metrics, tested: Metrics) -> dict[str, int]:
        """Nothing that an epoch's record would have to add."""
        return {}

    def close(self) -> None:
        """There is nothing to end."""

    def _order_of(self, epoch: int) -> jax.Array:
        """The order of the training examples in an epoch, the first being 0."""
        if epoch != self._epoch:
            # Epochs have been counted from 1 in the stream of random numbers.
            self._epoch, self._order = epoch, self._shuffle(self._shuffle_key, epoch + 1)
        return self._order


def _unfinished(state: TrainState, sums: TrainMetrics, stop: jax.typing.ArrayLike) -> jax.Array:
    return (state.step < stop) & metrics.finite(sums)
