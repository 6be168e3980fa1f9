"""ImageNet: Grain's workers read and decode, and batches wait on the devices before the step asks.

What an epoch visits, how each picture is cropped and which process reads it are functions of the
seed and of a position in the run. So the place of a pipeline is one number, the same for any number
of workers and processes, and a run that is stopped goes on with the very next example.
"""

import dataclasses
import functools
import multiprocessing
import os
import signal
import threading
from typing import NamedTuple

import absl.flags
import grain
import jax
import numpy as np

from input_pipeline import jpeg
from input_pipeline.batch import Batch
from input_pipeline.imagenet import Source
from input_pipeline.specs import DatasetSpec

# More would fill the memory of a large host with batches, for no gain.
MAX_WORKERS = 32
# Batches that wait on the devices: one to be used, one on its way.
DEVICE_BATCHES = 2
PADDING = -1


def default_workers() -> int:
    """A process for each core that this one may use, but for one that feeds the devices."""
    return min(MAX_WORKERS, max(1, _cores() - 1))


def _cores() -> int:
    """How many this process may use, where the system tells."""
    has_affinity = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


class Streamed(NamedTuple):
    """A batch, and what was left out of it.

    Attributes:
      batch: on the devices, its pictures uint8.
      unreadable: numbers of the records of this process's share that could not be decoded.
    """

    batch: Batch
    unreadable: np.ndarray


@dataclasses.dataclass(frozen=True)
class TrainExamples:
    """Makes training examples, each from random numbers of its own.

    Attributes:
      source: of the records.
      seed: of the run.
      epoch_size: examples in an epoch.
      side: of the pictures.
    """

    source: Source
    seed: int
    epoch_size: int
    side: int

    def __setstate__(self, state):
        self.__dict__.update(state)
        _begin_worker()

    def __call__(self, position: int, index: int) -> dict[str, np.ndarray]:
        """The example at a position of the run, made from record ``index``."""
        # One stream of the counter-based generator for each epoch and record.
        stream = np.random.Philox(key=self.seed, counter=[0, 0, position // self.epoch_size, index])
        rng = np.random.Generator(stream)
        flipped = rng.random() < 0.5

        def window(height: int, width: int) -> jpeg.Window:
            return jpeg.random_window(rng, height, width)

        example = _example(self.source, index, window, self.side)
        if flipped:
            example["image"] = jpeg.mirrored(example["image"])
        return example


@dataclasses.dataclass(frozen=True)
class EvalExamples:
    """Makes test examples, and padding past the last.

    Attributes:
      source: of the records.
      side: of the pictures.
    """

    source: Source
    side: int

    def __setstate__(self, state):
        self.__dict__.update(state)
        _begin_worker()

    def __call__(self, index: int) -> dict[str, np.ndarray]:
        """The example made from record ``index``."""
        if index >= self.source.size:
            return _blank(PADDING, self.side)
        return _example(self.source, index, jpeg.central_window, self.side)


def train_stream(
    spec: DatasetSpec,
    source: Source,
    *,
    seed: int,
    epochs: int,
    batch_size: int,
    sharding: jax.sharding.Sharding,
    workers: int,
) -> grain.DatasetIterator:
    """The training batches of a run, :class:`Streamed`, a new permutation each epoch.

    The few examples that do not fill a batch are others in each epoch. ``get_state()`` is the
    place after the last batch taken, whatever waits in buffers, and ``set_state`` goes there.

    Args:
      spec: gives the size of the pictures.
      source: of the records.
      seed: of the order and of the crops.
      epochs: after which the stream ends.
      batch_size: examples in a batch, over all processes.
      sharding: of the batch over the devices; each process reads its own share.
      workers: processes that decode; 0 decodes in threads of this one.
    """
    epoch_size = source.size // batch_size * batch_size
    order = grain.MapDataset.range(source.size).shuffle(seed=seed)[:epoch_size].repeat(epochs)
    examples = TrainExamples(source, seed, epoch_size, spec.image_shape[0])
    return _stream(order.map_with_index(examples), batch_size, sharding, workers)


def eval_stream(
    spec: DatasetSpec,
    source: Source,
    *,
    batch_size: int,
    sharding: jax.sharding.Sharding,
    workers: int,
) -> grain.DatasetIterator:
    """The test batches, in the order of the source, over and over: every example once a round.

    The last batch of a round is filled with padding of weight zero. The arguments are those of
    :func:`train_stream`.
    """
    round_size = -(-source.size // batch_size) * batch_size
    order = grain.MapDataset.range(round_size).repeat(reseed_each_epoch=False)
    examples = EvalExamples(source, spec.image_shape[0])
    return _stream(order.map(examples), batch_size, sharding, workers)


def host_batches(
    examples: grain.MapDataset, batch_size: int, shard: grain.sharding.ShardOptions, workers: int
) -> grain.IterDataset:
    """One process's share of every batch, as arrays of the host.

    Args:
      examples: of the run, in order.
      batch_size: examples in a batch, over all processes.
      shard: which process this is, of how many.
      workers: processes that decode; 0 decodes in threads of this one.
    """
    # Grain's workers ask for flags of absl, which nobody has parsed.
    if not absl.flags.FLAGS.is_parsed():
        absl.flags.FLAGS.mark_as_parsed()
    # A worker does one batch after another: threads in it would only fight over its interpreter.
    threads = 0 if workers else _cores()
    processes = grain.multiprocessing.MultiprocessingOptions(workers) if workers else None
    return grain.experimental.ElasticIterator(
        examples,
        batch_size,
        shard,
        # What is buffered here are batches, not examples.
        read_options=grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads),
        multiprocessing_options=processes,
    )


def _stream(
    examples: grain.MapDataset, batch_size: int, sharding: jax.sharding.Sharding, workers: int
) -> grain.DatasetIterator:
    shard = grain.sharding.ShardOptions(jax.process_index(), jax.process_count())
    place = functools.partial(jax.make_array_from_process_local_data, sharding)

    def to_devices(host: dict[str, np.ndarray]) -> Streamed:
        unreadable = host["index"][(host["weight"] == 0) & (host["index"] != PADDING)]
        # Copies, since a CPU device would go on using shared memory that Grain wants back.
        arrays = (np.array(host[name]) for name in ("image", "label", "weight"))
        return Streamed(Batch(*map(place, arrays)), np.array(unreadable))

    on_devices = host_batches(examples, batch_size, shard, workers).map(to_devices)
    ready = grain.experimental.ThreadPrefetchIterDataset(
        on_devices, prefetch_buffer_size=DEVICE_BATCHES
    )
    return iter(ready)


def _example(
    source: Source, index: int, window: jpeg.ChooseWindow, side: int
) -> dict[str, np.ndarray]:
    """One element of a batch; a blank one of weight zero where the picture cannot be read."""
    try:
        record = source[index]
        image = jpeg.picture(record.data, window, side)
    except (jpeg.UnreadableError, OSError):
        return _blank(index, side)
    return {
        "image": image,
        "label": np.int32(record.label),
        "weight": np.float32(1),
        "index": np.int64(index),
    }


def _blank(index: int, side: int) -> dict[str, np.ndarray]:
    return {
        "image": np.zeros((side, side, 3), np.uint8),
        "label": np.int32(0),
        "weight": np.float32(0),
        "index": np.int64(index),
    }


def _begin_worker() -> None:
    """Called where a worker process unpickles its work: it must end when its parent does."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    # Signals reach the whole group of processes, or job; the parent is the one to answer.
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)

    def follow():
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
