"""A feed of data that each device holds."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from input_pipeline import resident
from input_pipeline.batch import Batch, normalise
from input_pipeline.resident import Arrays, Split
from training import metrics, sharding
from training.feeds.feed import OnMesh, statistics_images
from training.metrics import Metrics, TrainMetrics
from training.plan import Plan
from training.state import Arrays as State
from training.state import Model, TrainState


class ResidentFeed(OnMesh):
    """Trains and evaluates on data that each device holds, with the batches made inside jit.

    XLA's CPU backend runs a loop of known length on one thread, and a loop whose length is an
    argument on all threads. So lengths are arguments here, and one program serves every length.
    But convolutions run on one thread in any loop, so convolutional networks take their steps one
    by one on a CPU. The data are arguments too: captured, they would be constants of the program.

    Attributes:
      steps_per_epoch: the number of full batches in the training set.
    """

    def __init__(self, plan: Plan, data: Arrays):
        """Places the data, and builds the programs; each compiles when first called.

        Args:
          plan: what is trained, on devices that each hold the data and share each batch.
          data: the arrays of the data set, on the host.
        """
        super().__init__(plan)
        everywhere, over_batch = self._everywhere, self._over_batch
        spec, dtype = plan.config.spec, plan.dtype
        train_bs, test_bs = plan.config.train_bs, plan.config.test_bs
        train_step, eval_step = plan.train_step, plan.eval_step
        statistics_step = plan.statistics_step
        self.steps_per_epoch = len(data.train.labels) // train_bs
        self._eval_steps = -(-len(data.test.labels) // test_bs)
        # Each process has all of the data, and fills its own devices.
        place = lambda x: jax.make_array_from_process_local_data(everywhere, x, x.shape)
        self._train, self._test = jax.tree.map(place, (data.train, data.test))
        # The starting weights are drawn from the seed's key itself.
        key = jax.random.fold_in(jax.random.key(plan.config.seed), 1)
        self._shuffle_key, self._augment_key = jax.random.split(key)
        self._order_of_epoch: tuple[int, jax.Array] | None = None
        self._one_by_one = plan.convolutional and plan.mesh.devices.flat[0].platform == "cpu"
        chosen = statistics_images(len(data.train.labels), train_bs)
        self._statistics_batches = chosen.reshape(-1, train_bs)

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

        def steps(
            state: TrainState,
            sums: TrainMetrics,
            split: Split,
            order: jax.Array,
            key: jax.Array,
            stop: jax.Array,
        ) -> tuple[TrainState, TrainMetrics]:
            return jax.lax.while_loop(
                lambda carry: _unfinished(*carry, stop),
                lambda carry: step(*carry, split, order, key),
                (state, sums),
            )

        def score(model: Model, sums: Metrics, split: Split, index: jax.Array) -> Metrics:
            batch = resident.eval_batch(spec, split, index, test_bs, dtype)
            batch = jax.lax.with_sharding_constraint(batch, over_batch)
            return metrics.add(sums, eval_step(model, batch))

        def scores(model: Model, sums: Metrics, split: Split, stop: jax.Array) -> Metrics:
            one = lambda index, sums: score(model, sums, split, index)
            total: Metrics = jax.lax.fori_loop(0, stop, one, sums)
            return total

        def statistics(
            params: State, mean: State, split: Split, chosen: jax.Array, number: jax.Array
        ) -> State:
            assert statistics_step is not None
            images = normalise(spec, split.images[chosen], dtype)
            batch = Batch(images, split.labels[chosen], jnp.ones(train_bs, dtype))
            batch = jax.lax.with_sharding_constraint(batch, over_batch)
            return statistics_step(params, mean, batch, number)

        self._statistics = statistics_step and jax.jit(statistics, out_shardings=everywhere)
        self._shuffle = jax.jit(shuffle, out_shardings=everywhere)
        self._step = jax.jit(step, donate_argnums=0, out_shardings=(plan.shardings, everywhere))
        self._steps = jax.jit(steps, donate_argnums=0, out_shardings=(plan.shardings, everywhere))
        self._score = jax.jit(score, out_shardings=everywhere)
        self._scores = jax.jit(scores, out_shardings=everywhere)

    def compile(self, state: TrainState) -> TrainState:
        """Compiles every program, to keep that time out of the epochs. The state is donated."""
        order, sums = self._order_of(0), self._zero_metrics
        train, test = self._train, self._test
        if self._statistics:
            chosen = self._statistics_batches[0]
            self._statistics(state.params, state.batch_stats, train, chosen, 1)
        if self._one_by_one:
            # To call the step is to take it, so it is taken on a copy of the state.
            self._step(jax.tree.map(jnp.copy, state), sums, train, order, self._augment_key)
            self._score(state.model, self._zero_eval_metrics, test, 0)
        else:
            # Loops of no steps.
            state, _ = self._steps(state, sums, train, order, self._augment_key, 0)
            self._scores(state.model, self._zero_eval_metrics, test, 0)
        ready: TrainState = jax.block_until_ready(state)
        return ready

    def train(
        self, state: TrainState, sums: TrainMetrics, stop: int
    ) -> tuple[TrainState, TrainMetrics]:
        """Takes steps as :meth:`Feed.train` says, or until one is not finite."""
        order = self._order_of((stop - 1) // self.steps_per_epoch)
        if not self._one_by_one:
            state, sums = self._steps(state, sums, self._train, order, self._augment_key, stop)
            return state, sums
        # Waiting for each step costs nothing, as the device is the host.
        while _unfinished(state, sums, stop):
            state, sums = self._step(state, sums, self._train, order, self._augment_key)
        return state, sums

    def evaluate(self, models: Sequence[Model]) -> list[Metrics]:
        """Returns the metrics of each network on the test set, each example counted once."""
        return list(map(self._evaluate, models))

    def _evaluate(self, model: Model) -> Metrics:
        sums: Metrics = self._zero_eval_metrics
        if not self._one_by_one:
            sums = self._scores(model, sums, self._test, self._eval_steps)
        else:
            for index in range(self._eval_steps):
                sums = self._score(model, sums, self._test, index)
        return sums

    def with_statistics(self, model: Model) -> Model:
        """Returns a copy of a network in which BatchNorm has statistics of its own."""
        mean = model["batch_stats"]
        if self._statistics:
            for number, chosen in enumerate(self._statistics_batches, 1):
                mean = self._statistics(model["params"], mean, self._train, chosen, number)
        return sharding.copy({**model, "batch_stats": mean})

    def iterator_state(self) -> dict[str, Any]:
        """Returns an empty dict: the position in the data follows from the step."""
        return {}

    def restore(self, iterator_state: dict[str, Any], step: int) -> None:
        """Does nothing: the position in the data follows from the step."""

    def unreadable(self, trained: Metrics, tested: Metrics) -> None:
        """Returns None: all of the data have been read already."""

    def close(self) -> None:
        """Does nothing: there is no background work."""

    def _order_of(self, epoch: int) -> jax.Array:
        """Returns the order of the training examples in an epoch, counted from 0."""
        if self._order_of_epoch is None or self._order_of_epoch[0] != epoch:
            # The random numbers are derived from epochs counted from 1.
            self._order_of_epoch = epoch, self._shuffle(self._shuffle_key, epoch + 1)
        return self._order_of_epoch[1]


def _unfinished(state: TrainState, sums: TrainMetrics, stop: jax.typing.ArrayLike) -> jax.Array:
    return (state.step < stop) & metrics.finite(sums)
