"""Feeds of training data: held on the devices, or streamed from the host.

A feed owns its data and the compiled programs that use them, so the loop over epochs treats both
kinds alike.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from input_pipeline import resident
from input_pipeline.batch import Batch, normalise
from input_pipeline.errors import DataError
from input_pipeline.resident import Arrays, Split
from input_pipeline.specs import DatasetSpec
from training import metrics, sharding
from training.metrics import Metrics, TrainMetrics
from training.signals import PATIENCE_SECONDS, Request
from training.state import Arrays as State
from training.state import Model, TrainState

if TYPE_CHECKING:
    from input_pipeline.streaming import Source, Sources, Stream, Streamed

log = logging.getLogger(__name__)

# How often a feed that waits for data looks whether the run is asked to end.
POLL_SECONDS = 0.5

# How many training images the statistics of BatchNorm are taken of, at least a batch.
STATISTICS_IMAGES = 4096

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, TrainMetrics]]
EvalStep = Callable[[Model, Batch], Metrics]
StatisticsStep = Callable[[State, State, Batch, jax.Array], State]


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


class _OnMesh:
    """Holds what both kinds of feed have on the mesh: shardings, and the sums over no example."""

    def __init__(self, mesh: Mesh, dtype: jax.typing.DTypeLike):
        self.request = Request()
        self._everywhere = sharding.replicated(mesh)
        self._over_batch = sharding.over_batch(mesh)
        zero_train = lambda: metrics.zero_train_metrics(dtype)
        self._zero_metrics = sharding.make(self._everywhere, zero_train)
        self._zero_eval_metrics = sharding.make(
            self._everywhere, lambda: metrics.zero_metrics(dtype)
        )

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


class ResidentFeed(_OnMesh):
    """Trains and evaluates on data that each device holds, with the batches made inside jit.

    XLA's CPU backend runs a loop of known length on one thread, and a loop whose length is an
    argument on all threads. So lengths are arguments here, and one program serves every length.
    But convolutions run on one thread in any loop, so convolutional networks take their steps one
    by one on a CPU. The data are arguments too: captured, they would be constants of the program.

    Attributes:
      steps_per_epoch: the number of full batches in the training set.
    """

    def __init__(
        self,
        spec: DatasetSpec,
        data: Arrays,
        *,
        train_step: TrainStep,
        eval_step: EvalStep,
        statistics_step: StatisticsStep | None,
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
          spec: the spec of the data set.
          data: the arrays of the data set, on the host.
          train_step: the function in :mod:`training.step`, without its static arguments.
          eval_step: the function in :mod:`training.step`, without its static arguments.
          statistics_step: the function in :mod:`training.step`, without its static arguments, where
            it is needed.
          key: the random key for shuffling and augmentation.
          train_bs: examples per training batch.
          test_bs: examples per test batch.
          dtype: the dtype of the images that the network is given, and of the metrics.
          mesh: the mesh of the devices, which each hold the data, and share each batch.
          shardings: the shardings of the state.
          convolutional: whether the network has convolutions.
        """
        self.steps_per_epoch = len(data.train.labels) // train_bs
        self._eval_steps = -(-len(data.test.labels) // test_bs)
        super().__init__(mesh, dtype)
        everywhere, over_batch = self._everywhere, self._over_batch
        # Each process has all of the data, and fills its own devices.
        place = lambda x: jax.make_array_from_process_local_data(everywhere, x, x.shape)
        self._train, self._test = jax.tree.map(place, (data.train, data.test))
        self._shuffle_key, self._augment_key = jax.random.split(key)
        self._order_of_epoch: tuple[int, jax.Array] | None = None
        self._one_by_one = convolutional and mesh.devices.flat[0].platform == "cpu"
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
        self._step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, everywhere))
        self._steps = jax.jit(steps, donate_argnums=0, out_shardings=(shardings, everywhere))
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
        """Takes steps until ``state.step`` is ``stop`` or a step is not finite.

        Args:
          state: the training state, which is donated: do not use it again.
          sums: the metrics of the epoch so far.
          stop: a step of this epoch, or the first step of the next.
        """
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


def streamed_step(
    spec: DatasetSpec,
    train_step: TrainStep,
    dtype: jax.typing.DTypeLike,
    mesh: Mesh,
    shardings: TrainState,
) -> jax.stages.Wrapped:
    """Returns the program of a training step on a batch that was streamed.

    Args:
      spec: the spec of the data set.
      train_step: the function in :mod:`training.step`, without its static arguments.
      dtype: the dtype of the images that the network is given, and of the metrics.
      mesh: the mesh of the devices, which share each batch.
      shardings: the shardings of the state.

    Returns:
      ``(state, sums, batch) -> (state, sums)``, compiled when it is called. The state is donated.
    """

    def step(
        state: TrainState, sums: TrainMetrics, batch: Batch
    ) -> tuple[TrainState, TrainMetrics]:
        state, measured = train_step(state, _prepared(spec, batch, dtype))
        return state, metrics.add_train(sums, measured)

    out_shardings = (shardings, sharding.replicated(mesh))
    program: jax.stages.Wrapped = jax.jit(step, donate_argnums=0, out_shardings=out_shardings)
    return program


def abstract_batch(spec: DatasetSpec, size: int, over_batch: jax.sharding.Sharding) -> Batch:
    """Returns the shapes of a batch that was streamed, with their sharding."""

    def like(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> Any:
        return jax.ShapeDtypeStruct((size, *shape), dtype, sharding=over_batch)

    return Batch(like(spec.image_shape, jnp.uint8), like((), jnp.int32), like((), jnp.float32))


def _prepared(spec: DatasetSpec, batch: Batch, dtype: jax.typing.DTypeLike) -> Batch:
    images = normalise(spec, batch.images, dtype)
    return Batch(images, batch.labels, batch.weights.astype(dtype))


class StreamedFeed(_OnMesh):
    """Trains and evaluates on batches that arrive while the previous step is taken.

    Attributes:
      steps_per_epoch: the number of full batches in the training set.
    """

    def __init__(
        self,
        spec: DatasetSpec,
        train: Stream,
        test: Stream,
        statistics: Stream | None,
        sources: Sources,
        *,
        train_step: TrainStep,
        eval_step: EvalStep,
        statistics_step: StatisticsStep | None,
        train_bs: int,
        test_bs: int,
        dtype: jax.typing.DTypeLike,
        mesh: Mesh,
        shardings: TrainState,
    ):
        """Builds the programs; they compile in :meth:`compile`.

        Args:
          spec: the spec of the data set.
          train: the training batches, from :func:`input_pipeline.streaming.train_stream`.
          test: the test batches, from :func:`input_pipeline.streaming.eval_stream`.
          statistics: batches of :func:`statistics_images`, from the same, where they are needed.
          sources: the sources of the splits, used to name their records.
          train_step: the function in :mod:`training.step`, without its static arguments.
          eval_step: the function in :mod:`training.step`, without its static arguments.
          statistics_step: the function in :mod:`training.step`, without its static arguments, where
            it is needed.
          train_bs: examples per training batch.
          test_bs: examples per test batch.
          dtype: the dtype of the images that the network is given, and of the metrics.
          mesh: the mesh of the devices, which share each batch.
          shardings: the shardings of the state.
        """
        self.steps_per_epoch = sources.train.size // train_bs
        self._eval_steps = -(-sources.test.size // test_bs)
        self._spec, self._sources = spec, sources
        self._train, self._test, self._statistics_batches = train, test, statistics
        self._statistics_steps = len(statistics_images(sources.train.size, train_bs)) // train_bs
        self._batch_sizes = train_bs, test_bs
        super().__init__(mesh, dtype)
        self._steps_taken = 0
        self._stalled = False
        self._reported: set[str] = set()
        self._step: Any = streamed_step(spec, train_step, dtype, mesh, shardings)

        def score(model: Model, sums: Metrics, batch: Batch) -> Metrics:
            return metrics.add(sums, eval_step(model, _prepared(spec, batch, dtype)))

        def statistics_of(params: State, mean: State, batch: Batch, number: jax.Array) -> State:
            assert statistics_step is not None
            return statistics_step(params, mean, _prepared(spec, batch, dtype), number)

        self._score: Any = jax.jit(score, out_shardings=self._everywhere)
        self._statistics: Any = jax.jit(statistics_of, out_shardings=self._everywhere)

    def compile(self, state: TrainState) -> TrainState:
        """Compiles every program while the first batches are being decoded."""
        self._train.start_prefetch()
        self._test.start_prefetch()
        like = lambda size: abstract_batch(self._spec, size, self._over_batch)
        train, test = map(like, self._batch_sizes)
        self._step = self._step.lower(state, self._zero_metrics, train).compile()
        self._score = self._score.lower(state.model, self._zero_eval_metrics, test).compile()
        if self._statistics_batches:
            self._statistics_batches.start_prefetch()
            arrays = state.params, state.batch_stats
            self._statistics = self._statistics.lower(*arrays, train, 1).compile()
        ready: TrainState = jax.block_until_ready(state)
        return ready

    def train(
        self, state: TrainState, sums: TrainMetrics, stop: int
    ) -> tuple[TrainState, TrainMetrics]:
        """Takes steps until ``stop`` have been taken in all.

        Args:
          state: the training state, which is donated: do not use it again.
          sums: the metrics of the epoch so far.
          stop: a step of this epoch, or the first step of the next.
        """
        while self._steps_taken < stop:
            try:
                batch, unreadable = self._next(self._train)
            except Stalled as stalled:
                stalled.reached = state, sums, self._steps_taken
                raise
            self._report(self._sources.train, unreadable)
            state, sums = self._step(state, sums, batch)
            self._steps_taken += 1
        return state, sums

    def evaluate(self, models: Sequence[Model]) -> list[Metrics]:
        """Returns the metrics of each network on the test set, each example counted once."""
        sums = [self._zero_eval_metrics for _ in models]
        for _ in range(self._eval_steps):
            batch, unreadable = self._next(self._test)
            self._report(self._sources.test, unreadable)
            sums = [self._score(m, s, batch) for m, s in zip(models, sums, strict=True)]
        return sums

    def with_statistics(self, model: Model) -> Model:
        """Returns a copy of a network in which BatchNorm has statistics of its own."""
        mean = model["batch_stats"]
        if self._statistics_batches:
            for number in range(1, self._statistics_steps + 1):
                batch, unreadable = self._next(self._statistics_batches)
                self._report(self._sources.train, unreadable)
                mean = self._statistics(model["params"], mean, batch, number)
        return sharding.copy({**model, "batch_stats": mean})

    def iterator_state(self) -> dict[str, Any]:
        """Returns the position in the training data after the last step, as JSON values."""
        return self._train.get_state()

    def restore(self, iterator_state: dict[str, Any], step: int) -> None:
        """Goes to a position from :meth:`iterator_state`, saved after step number ``step``."""
        self._train.set_state(iterator_state)
        self._steps_taken = step

    def unreadable(self, trained: Metrics, tested: Metrics) -> int:
        """Returns the number of unreadable images in an epoch and its test, in all processes."""
        expected = self.steps_per_epoch * self._batch_sizes[0] + self._sources.test.size
        return round(expected - float(trained.examples) - float(tested.examples))

    def close(self) -> None:
        """Stops the worker processes, and waits for them, though not long if they are stalled."""
        if not self._stalled:
            self._close()
            return
        for worker in multiprocessing.active_children():
            worker.kill()
        closing = threading.Thread(target=self._close, daemon=True)
        closing.start()
        closing.join(PATIENCE_SECONDS)

    def _close(self) -> None:
        for stream in (self._train, self._test, self._statistics_batches):
            if stream:
                stream.close()
        # Frames of finished threads hold Grain's shared memory in reference cycles.
        gc.collect()

    def _next(self, stream: Stream) -> Streamed:
        """Returns the next batch, for which another thread waits, as signals are handled here."""
        taken: Future[Streamed] = Future()

        def take() -> None:
            try:
                taken.set_result(next(stream))
            except BaseException as error:
                taken.set_exception(error)

        threading.Thread(target=take, daemon=True).start()
        start = time.monotonic()
        while not futures.wait([taken], POLL_SECONDS).done:
            waited = time.monotonic() - start
            if self.request.signum and jax.process_count() == 1:
                self._stalled = True
                raise Stalled
            if self.request.signum and waited > PATIENCE_SECONDS:
                # Others wait in a step for this process, and cannot save.
                raise DataError(f"data have not come for {waited:.0f} s, and the run is to end")
        try:
            return taken.result()
        except RuntimeError as error:
            if "Worker process was terminated" not in str(error):
                raise
            raise DataError(
                "a worker process was killed, as the system does where memory is short; give fewer "
                "--workers, or smaller batches"
            ) from error

    def _report(self, source: Source, unreadable: np.ndarray) -> None:
        """Logs the name of each image that could not be read, once."""
        for name in sorted({source.name(int(index)) for index in unreadable} - self._reported):
            log.warning("left out, as it cannot be read: %s", name)
            self._reported.add(name)
