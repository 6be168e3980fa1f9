"""Large data sets: Grain's workers read and decode, and batches wait on the devices for the step.

The examples of an epoch, their places in a batch and the crop of each image are functions of the
seed and of a position in the run. So the position of a pipeline is one number, the same for any
number of workers and processes. A stopped run continues with the very next example.
"""

import dataclasses
import functools
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypedDict

import absl.flags
import grain
import jax
import jax.numpy as jnp
import numpy as np

from input_pipeline import jpeg
from input_pipeline.batch import Batch
from input_pipeline.cores import cores
from input_pipeline.errors import DataError
from input_pipeline.patience import patiently
from input_pipeline.specs import DatasetSpec

log = logging.getLogger(__name__)

# Batches that wait on the devices: one ready, one on its way.
DEVICE_BATCHES = 2
# Batches of each worker that Grain has in shared memory at a time, as measured.
SHARED_BATCHES = 4
PADDING = -1
# How long to wait before each further try to read a record.
RETRY_SECONDS = (0.1, 1, 4)
# A record whose reading takes so long is named.
STALLED_SECONDS = 60
# Batches in an epoch of noise: enough for timing, but few enough for a short wait.
NOISE_TRAIN_BATCHES = 100
NOISE_EVAL_BATCHES = 10


class Record(NamedTuple):
    """An encoded image and its class."""

    data: bytes
    label: int


class Source(Protocol):
    """Records by number. Worker processes get a copy, so a source must be small enough to send."""

    size: int

    def __getitem__(self, index: int) -> Record:
        """Reads a record.

        Raises:
          UnreadableError: if it is damaged.
          OSError: if the system cannot read it.
        """

    def name(self, index: int) -> str:
        """Returns the name by which a person can find the record, for which it may be read."""

    def place(self, index: int) -> str:
        """Returns where the record is, without reading it."""

    def fingerprint(self) -> int:
        """Returns a number that other records, by name, order or class, would not have."""


class Sources(NamedTuple):
    """The two splits, and the name of each class in the order of the labels."""

    train: Source
    test: Source
    classes: tuple[str, ...]


class Streamed(NamedTuple):
    """A batch, and what was left out of it.

    Attributes:
      batch: the batch, on the devices, with uint8 images.
      unreadable: the numbers of the records in this process's share that could not be decoded.
    """

    batch: Batch
    unreadable: np.ndarray


class Stream(Protocol):
    """Endless batches, with a position that can be saved: Grain's iterator, or noise."""

    def __next__(self) -> Streamed:
        """Returns the next batch."""

    def start_prefetch(self) -> None:
        """Starts to read before the first batch is requested."""

    def get_state(self) -> dict[str, Any]:
        """Returns the position after the last batch taken, as JSON data."""

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves to a position that :meth:`get_state` returned."""

    def close(self) -> None:
        """Ends the worker processes."""


class Example(TypedDict):
    """One element of a batch.

    Attributes:
      image: ``(side, side, 3)``, uint8.
      label: the class.
      weight: 1, or 0 for a blank.
      index: the number of the record, or ``PADDING``.
    """

    image: np.ndarray
    label: np.int32
    weight: np.float32
    index: np.int64


@dataclasses.dataclass(frozen=True)
class TrainExamples:
    """Makes training examples, each from its own stream of random numbers.

    Attributes:
      source: the source of the records.
      seed: the seed of the run.
      epoch_size: the number of examples in an epoch.
      side: the height and width of the images.
    """

    source: Source
    seed: int
    epoch_size: int
    side: int

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _begin_worker()

    def __call__(self, position: int, index: int) -> Example:
        """Makes the example at a position of the run from record ``index``."""
        # One stream of the counter-based generator for each epoch and record.
        stream = np.random.Philox(key=self.seed, counter=[0, 0, position // self.epoch_size, index])
        rng = np.random.Generator(stream)
        flipped = rng.random() < 0.5

        def window(height: int, width: int) -> jpeg.Window:
            return jpeg.random_window(rng, height, width)

        example = make_example(self.source, index, window, self.side)
        if flipped:
            example["image"] = jpeg.mirrored(example["image"])
        return example


@dataclasses.dataclass(frozen=True)
class EvalExamples:
    """Makes examples as tests see them, and padding past the last.

    Attributes:
      source: the source of the records.
      side: the height and width of the images.
    """

    source: Source
    side: int

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _begin_worker()

    def __call__(self, index: int) -> Example:
        """Makes the example from record ``index``."""
        if index >= self.source.size:
            return _blank(PADDING, self.side)
        return make_example(self.source, index, jpeg.central_window, self.side)


def train_stream(
    spec: DatasetSpec,
    source: Source,
    *,
    seed: int,
    epochs: int,
    batch_size: int,
    sharding: jax.sharding.Sharding,
    workers: int,
) -> grain.DatasetIterator[Streamed]:
    """Returns the training batches of a run, in a new permutation each epoch.

    The few examples that do not fill a batch differ from epoch to epoch. ``get_state()`` returns
    the position after the last batch taken, whatever waits in buffers, and ``set_state`` moves
    there.

    Args:
      spec: the data set, which determines the size of the images.
      source: the source of the records.
      seed: the seed of the order and of the crops.
      epochs: the number of epochs after which the stream ends.
      batch_size: examples per batch, over all processes.
      sharding: the sharding of the batch over the devices. Each process reads what its devices
        need, in whatever way they share the batch with those of others.
      workers: the number of processes that decode; 0 decodes in threads of this process.
    """
    epoch_size = source.size // batch_size * batch_size
    order = grain.MapDataset.range(source.size).shuffle(seed=seed)[:epoch_size].repeat(epochs)
    examples = TrainExamples(source, seed, epoch_size, spec.image_shape[0])
    return _stream(order.map_with_index(examples), batch_size, sharding, workers)


def eval_stream(
    spec: DatasetSpec,
    source: Source,
    records: Sequence[int] | np.ndarray | None = None,
    *,
    batch_size: int,
    sharding: jax.sharding.Sharding,
    workers: int,
) -> grain.DatasetIterator[Streamed]:
    """Returns batches without augmentation, repeated without end.

    Args:
      spec: as in :func:`train_stream`, like the others.
      source: the source of the records.
      records: the numbers of the records of a round, in order, which fill batches; None means each
        record once, in the order of the source, and then padding of weight zero.
      batch_size: examples per batch, over all processes.
      sharding: the sharding of the batch over the devices.
      workers: the number of processes that decode.
    """
    if records is None:
        records = range(-(-source.size // batch_size) * batch_size)
    order = grain.MapDataset.source(records).repeat(reseed_each_epoch=False)
    examples = EvalExamples(source, spec.image_shape[0])
    return _stream(order.map(examples), batch_size, sharding, workers)


@dataclasses.dataclass
class Noise:
    """A split without records to read."""

    size: int

    def __getitem__(self, index: int) -> Record:
        raise IndexError(index)

    def name(self, index: int) -> str:
        """Raises IndexError, as there are no records."""
        raise IndexError(index)

    place = name

    def fingerprint(self) -> int:
        """Returns the number of examples."""
        return self.size


def noise_sources(train_bs: int, test_bs: int) -> Sources:
    """Returns splits with as many examples as an epoch and a test of noise have."""
    return Sources(
        Noise(NOISE_TRAIN_BATCHES * train_bs), Noise(NOISE_EVAL_BATCHES * test_bs), classes=()
    )


class NoiseStream:
    """The same batch, already on the devices, over and over."""

    def __init__(self, spec: DatasetSpec, batch_size: int, sharding: jax.sharding.Sharding):
        """Draws the batch.

        Args:
          spec: the data set, which determines the shape of the images and the number of classes.
          batch_size: examples per batch, over all processes.
          sharding: the sharding of the batch over the devices.
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
        """Does nothing: the batch is there already."""

    def get_state(self) -> dict[str, Any]:
        """Returns nothing: every position is the same."""
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        """Does nothing: every position is the same."""

    def close(self) -> None:
        """Does nothing: there are no worker processes."""


def rows_of_process(sharding: jax.sharding.Sharding, batch_size: int) -> np.ndarray:
    """Returns the numbers of a batch's rows that this process reads, in ascending order.

    These are the rows that are on its devices, of which other processes may have some too; and if
    their number does not divide the size of the batch, as many others as are needed for that.
    """
    rows = np.arange(batch_size)
    indices = sharding.addressable_devices_indices_map((batch_size,)).values()
    needed = np.unique(np.concatenate([rows[index] for index in indices]))
    count = next(n for n in range(len(needed), batch_size + 1) if batch_size % n == 0)
    others = np.setdiff1d(rows, needed)
    return np.union1d(needed, others[: count - len(needed)])


def host_batches(
    examples: grain.MapDataset[Example], batch_size: int, rows: np.ndarray, workers: int
) -> grain.IterDataset[dict[str, np.ndarray]]:
    """Returns one process's share of every batch, as arrays on the host.

    Args:
      examples: the examples of the run, in order.
      batch_size: examples per batch, over all processes.
      rows: the rows of each batch that this process reads, from :func:`rows_of_process`.
      workers: the number of processes that decode; 0 decodes in threads of this process.
    """
    # Grain's workers read absl flags, which have not been parsed.
    if not absl.flags.FLAGS.is_parsed():
        absl.flags.FLAGS.mark_as_parsed()
    # A worker makes one batch after another. Threads would only compete for its interpreter.
    threads = 0 if workers else cores()
    processes = grain.multiprocessing.MultiprocessingOptions(workers) if workers else None
    # Of so many examples, Grain's iterator reads the first.
    stride = batch_size // len(rows)

    def example(position: int) -> Example | None:
        batch, place = divmod(position, batch_size)
        return examples[batch * batch_size + int(rows[place // stride])]

    return grain.experimental.ElasticIterator(
        grain.MapDataset.range(len(examples)).map(example),
        batch_size,
        # Its position counts the examples of all processes, whichever of them this one reads.
        grain.sharding.ShardOptions(shard_index=0, shard_count=stride),
        # Grain buffers whole batches here, not examples.
        read_options=grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads),
        multiprocessing_options=processes,
    )


def _stream(
    examples: grain.MapDataset[Example],
    batch_size: int,
    sharding: jax.sharding.Sharding,
    workers: int,
) -> grain.DatasetIterator[Streamed]:
    rows = rows_of_process(sharding, batch_size)
    numbers = np.arange(batch_size)

    def place(local: np.ndarray) -> jax.Array:
        # Copies, since a CPU device would keep using shared memory that Grain reuses.
        part = lambda index: local[np.searchsorted(rows, numbers[index[0]])]
        return jax.make_array_from_callback((batch_size, *local.shape[1:]), sharding, part)

    def to_devices(host: dict[str, np.ndarray]) -> Streamed:
        unreadable = host["index"][(host["weight"] == 0) & (host["index"] != PADDING)]
        arrays = (host[name] for name in ("image", "label", "weight"))
        return Streamed(Batch(*map(place, arrays)), np.array(unreadable))

    on_devices = host_batches(examples, batch_size, rows, workers).map(to_devices)
    ready = grain.experimental.ThreadPrefetchIterDataset(
        on_devices, prefetch_buffer_size=DEVICE_BATCHES
    )
    return iter(ready)


def make_example(source: Source, index: int, window: jpeg.ChooseWindow, side: int) -> Example:
    """Makes one element of a batch, a blank of weight zero if the image cannot be decoded.

    Raises:
      DataError: if the record cannot be read, which says nothing about the image.
    """
    try:
        record = _read(source, index)
        image = jpeg.decode(record.data, window, side)
    except jpeg.UnreadableError:
        return _blank(index, side)
    return {
        "image": image,
        "label": np.int32(record.label),
        "weight": np.float32(1),
        "index": np.int64(index),
    }


def _read(source: Source, index: int) -> Record:
    """Reads a record, and reads it again if the system could not."""
    by_system = lambda error: isinstance(error, OSError)
    _watch_reads()
    _reads[threading.get_ident()] = time.monotonic(), source, index
    try:
        return patiently(lambda: source[index], RETRY_SECONDS, by_system)
    except OSError as error:
        raise DataError(f"{source.place(index)}: {error.strerror or error}") from None
    finally:
        del _reads[threading.get_ident()]


# What each thread of this process reads, and since when.
_reads: dict[int, tuple[float, Source, int]] = {}


@functools.cache
def _watch_reads() -> None:
    """Names records from now on whose reading takes too long, as on a mount that is stalled."""

    def watch() -> None:
        named: set[tuple[float, Source, int]] = set()
        while True:
            time.sleep(STALLED_SECONDS / 10)
            late = {r for r in list(_reads.values()) if time.monotonic() - r[0] > STALLED_SECONDS}
            for _, source, index in late - named:
                log.warning(
                    "%s: has been read for %d s, and does not come",
                    source.place(index),
                    STALLED_SECONDS,
                )
            named = late

    threading.Thread(target=watch, daemon=True).start()


def _blank(index: int, side: int) -> Example:
    return {
        "image": np.zeros((side, side, 3), np.uint8),
        "label": np.int32(0),
        "weight": np.float32(0),
        "index": np.int64(index),
    }


def _begin_worker() -> None:
    """Makes a worker process end when its parent does. Unpickling its work calls this."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    # Signals reach the whole process group or job. Only the parent answers them.
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
