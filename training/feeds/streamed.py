"""A feed of data that are streamed from the host."""

from __future__ import annotations

import functools
import gc
import logging
import math
import multiprocessing
import os
import shutil
import socket
import threading
import time
from collections.abc import Sequence
from concurrent import futures
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from input_pipeline import cores
from input_pipeline.batch import Batch, normalise
from input_pipeline.errors import DataError
from training import metrics, multihost, sharding
from training.config import TrainConfig
from training.errors import ConfigError
from training.feeds.feed import OnMesh, Stalled, statistics_images
from training.metrics import Metrics, TrainMetrics
from training.plan import Plan
from training.signals import PATIENCE_SECONDS
from training.state import Arrays as State
from training.state import Model, TrainState

if TYPE_CHECKING:
    from input_pipeline.streaming import Source, Sources, Stream, Streamed

log = logging.getLogger(__name__)

# How often a feed that waits for data looks whether the run is asked to end.
POLL_SECONDS = 0.5

# Where Grain's workers leave their batches.
SHARED_MEMORY = "/dev/shm"


def streamed_step(plan: Plan) -> jax.stages.Wrapped:
    """Returns the program of a training step on a batch that was streamed.

    Returns:
      ``(state, sums, batch) -> (state, sums)``, compiled when it is called. The state is donated.
    """

    def step(
        state: TrainState, sums: TrainMetrics, batch: Batch
    ) -> tuple[TrainState, TrainMetrics]:
        state, measured = plan.train_step(state, _prepared(plan, batch))
        return state, metrics.add_train(sums, measured)

    out_shardings = (plan.shardings, sharding.replicated(plan.mesh))
    program: jax.stages.Wrapped = jax.jit(step, donate_argnums=0, out_shardings=out_shardings)
    return program


def abstract_batch(plan: Plan, size: int) -> Batch:
    """Returns the shapes of a batch that was streamed, with their sharding."""
    over_batch = sharding.over_batch(plan.mesh)

    def like(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> Any:
        return jax.ShapeDtypeStruct((size, *shape), dtype, sharding=over_batch)

    image = like(plan.config.spec.image_shape, jnp.uint8)
    return Batch(image, like((), jnp.int32), like((), jnp.float32))


def _prepared(plan: Plan, batch: Batch) -> Batch:
    images = normalise(plan.config.spec, batch.images, plan.dtype)
    return Batch(images, batch.labels, batch.weights.astype(plan.dtype))


class StreamedFeed(OnMesh):
    """Trains and evaluates on batches that arrive while the previous step is taken.

    Attributes:
      steps_per_epoch: the number of full batches in the training set.
    """

    def __init__(self, plan: Plan, sources: Sources):
        """Opens the streams, and builds the programs; they compile in :meth:`compile`.

        Args:
          plan: what is trained, on devices that share each batch.
          sources: the sources of the splits.

        Raises:
          ConfigError: if this machine has not the memory for the workers' batches.
        """
        super().__init__(plan)
        train_bs, test_bs = plan.config.train_bs, plan.config.test_bs
        self.steps_per_epoch = sources.train.size // train_bs
        self._eval_steps = -(-sources.test.size // test_bs)
        self._statistics_steps = len(statistics_images(sources.train.size, train_bs)) // train_bs
        self._plan, self._sources = plan, sources
        self._train, self._test, self._statistics_batches = _open_streams(plan, sources)
        self._steps_taken = 0
        self._stalled = False
        self._reported: set[str] = set()
        self._step: Any = streamed_step(plan)
        statistics_step = plan.statistics_step

        def score(model: Model, sums: Metrics, batch: Batch) -> Metrics:
            return metrics.add(sums, plan.eval_step(model, _prepared(plan, batch)))

        def statistics_of(params: State, mean: State, batch: Batch, number: jax.Array) -> State:
            assert statistics_step is not None
            return statistics_step(params, mean, _prepared(plan, batch), number)

        self._score: Any = jax.jit(score, out_shardings=self._everywhere)
        self._statistics: Any = jax.jit(statistics_of, out_shardings=self._everywhere)

    def compile(self, state: TrainState) -> TrainState:
        """Compiles every program while the first batches are being decoded."""
        self._train.start_prefetch()
        self._test.start_prefetch()
        config = self._plan.config
        train, test = (abstract_batch(self._plan, n) for n in (config.train_bs, config.test_bs))
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
        """Takes steps as :meth:`Feed.train` says, and counts those taken in all."""
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
        expected = self.steps_per_epoch * self._plan.config.train_bs + self._sources.test.size
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


def _open_streams(plan: Plan, data: Sources) -> tuple[Stream, Stream, Stream | None]:
    """The training and the test batches of a large data set, and those for statistics if any."""
    from input_pipeline import streaming

    config, split = plan.config, sharding.over_batch(plan.mesh)
    if config.spec.loader == "noise":
        noise = functools.partial(streaming.NoiseStream, config.spec, sharding=split)
        batches = noise(config.train_bs)
        return batches, noise(config.test_bs), batches if plan.statistics_step else None
    # Counted and checked in every process, since --workers and hosts may differ.
    host = socket.gethostname()
    on_host = multihost.count_alike(host)
    on_cores = multihost.count_alike(host, cores.affinity())
    workers = cores.default_workers(on_cores) if config.workers is None else config.workers
    shares = (streaming.rows_of_process(split, n) for n in (config.train_bs, config.test_bs))
    images = on_host * sum(map(len, shares))
    multihost.in_every(lambda: _check_shared_memory(config, workers, images))
    train = streaming.train_stream(
        config.spec,
        data.train,
        seed=config.seed,
        epochs=config.epochs,
        batch_size=config.train_bs,
        sharding=split,
        workers=workers,
    )
    evaluation = streaming.eval_stream(
        config.spec, data.test, batch_size=config.test_bs, sharding=split, workers=workers
    )
    if not plan.statistics_step:
        return train, evaluation, None
    statistics = streaming.eval_stream(
        config.spec,
        data.train,
        statistics_images(data.train.size, config.train_bs),
        batch_size=config.train_bs,
        sharding=split,
        workers=0,  # Threads, as it is idle but for an evaluation.
    )
    return train, evaluation, statistics


def _check_shared_memory(config: TrainConfig, workers: int, images: int) -> None:
    """Raises ConfigError if the batches of all workers on this host do not fit into its memory.

    Args:
      config: the config of the run.
      workers: how many workers each stream of each process has.
      images: how many images the processes on this host read of two batches, one of each stream.
    """
    from input_pipeline.streaming import SHARED_BATCHES

    needed = SHARED_BATCHES * workers * images * math.prod(config.spec.image_shape)
    free = shutil.disk_usage(SHARED_MEMORY).free if os.path.isdir(SHARED_MEMORY) else math.inf
    if needed > free:
        raise ConfigError(
            f"--workers {workers}: their batches take up to {needed / 1e6:,.0f} MB of "
            f"{SHARED_MEMORY}, where {free / 1e6:,.0f} MB are free; give fewer workers, smaller "
            "batches, or the container more shared memory (docker run --shm-size)"
        )
