"""Small data sets: the bundled digits or a prepared TFDS folder, whole on the device as uint8.

They are decoded once, into a file beside the prepared data. Shuffling, augmentation and
normalisation are traced into the compiled training program. One dispatch can therefore run any
number of steps without the host.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from input_pipeline import classes, cloud, prepared
from input_pipeline.batch import Batch, normalise
from input_pipeline.errors import DataError
from input_pipeline.specs import DatasetSpec

if TYPE_CHECKING:
    from tensorflow_datasets.core import DatasetBuilder

log = logging.getLogger(__name__)


class Split(NamedTuple):
    """Images ``(n, height, width, channels)``, uint8, with labels ``(n,)``, int32."""

    images: np.ndarray | jax.Array
    labels: np.ndarray | jax.Array

    @property
    def size(self) -> int:
        """The number of examples."""
        return len(self.labels)

    def fingerprint(self) -> int:
        """Returns a number that other examples would not have."""
        labels, images = (np.ascontiguousarray(a).data for a in (self.labels, self.images))
        return zlib.crc32(labels, zlib.crc32(images))


SPLITS = ("train", "test")
Splits: TypeAlias = tuple[Split, Split]


class Arrays(NamedTuple):
    """A whole data set in host memory.

    Attributes:
      train: its training split.
      test: its test split.
      classes: the name of each class, in the order of the labels.
    """

    train: Split
    test: Split
    classes: tuple[str, ...]

    def labelled_by(self, known: Sequence[str], origin: str) -> Arrays:
        """Returns the data with the labels of a network that was trained on classes of these names.

        Args:
          known: the names in the order of its labels; if there are none, labels stay.
          origin: where the data are from, as the error says it.

        Raises:
          DataError: if a class is not known.
        """
        if not known or tuple(known) == self.classes:
            return self
        of_class = np.array(classes.labels(self.classes, known, origin), np.int32)
        train, test = (split._replace(labels=of_class[split.labels]) for split in self[:2])
        return Arrays(train, test, tuple(known))


def load(spec: DatasetSpec, data_dir: str | os.PathLike[str] | None = None) -> Arrays:
    """Loads a small data set, and prepares it first if necessary.

    Args:
      spec: the data set.
      data_dir: the folder in which TFDS keeps prepared data; None means the default of
        :func:`input_pipeline.prepared.data_path`.

    Raises:
      DataError: if it is neither prepared nor can be downloaded, or has unexpected content.
    """
    if spec.loader == "digits":
        return _digits()
    folder = prepared.data_path(data_dir)
    if cloud.is_remote(folder):
        # A bucket has no locks, nor caches beside the data.
        with prepared.reading(folder):
            prepared.check_available(spec, folder)
            builder = prepared.prepared_builder(spec, folder)
            with prepared.understanding(spec, folder):
                return Arrays(*_decode_all(spec, builder), prepared.class_names(spec, builder))
    prepared.check_available(spec, folder)
    # One process prepares and decodes. Others that start meanwhile wait and read its cache.
    with _lock(Path(folder) / f".{spec.tfds_name}.lock"):
        builder = prepared.prepared_builder(spec, folder)
        with prepared.understanding(spec, folder):
            return Arrays(*_decoded(spec, builder), prepared.class_names(spec, builder))


def _digits() -> Arrays:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int32)
    # The file is ordered by writer. RandomState's streams are frozen, so the split never changes.
    order = np.random.RandomState(0).permutation(len(labels))
    train, test = (Split(images[part], labels[part]) for part in (order[:-360], order[-360:]))
    return Arrays(train, test, tuple(map(str, bunch.target_names)))


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Holds a lock file, or nothing where none can be created (in a read-only folder)."""
    import filelock

    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(path) if os.access(path.parent, os.W_OK) else nullcontext():
        yield


def _decoded(spec: DatasetSpec, builder: DatasetBuilder) -> Splits:
    """Returns the splits of a prepared data set, from the cache beside it where that is current."""
    folder = Path(os.fspath(builder.data_path))
    cache = folder.parent / f"decoded-{folder.name}.npz"
    fingerprint = _fingerprint(folder)
    splits = _read_cache(cache, fingerprint)
    if splits is None:
        log.info("decoding %s once; the next start reads %s", spec.name, cache)
        splits = _decode_all(spec, builder)
        _write_cache(cache, fingerprint, splits)
    return splits


def _fingerprint(folder: Path) -> str:
    """Returns a hash that changes whenever a file of the prepared data set does."""
    files = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in folder.iterdir())
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def _read_cache(path: Path, fingerprint: str) -> Splits | None:
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            if str(stored["fingerprint"]) != fingerprint:
                return None
            # Reading a member to its end checks its CRC, so a damaged file raises an error here.
            train, test = (Split(stored[f"{s}_images"], stored[f"{s}_labels"]) for s in SPLITS)
            return train, test
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        log.warning("decoding again: %s is damaged (%s)", path, error)
        return None


def _write_cache(path: Path, fingerprint: str, splits: Splits) -> None:
    members: dict[str, Any] = {"fingerprint": np.array(fingerprint)}
    for name, split in zip(SPLITS, splits, strict=True):
        members |= {f"{name}_images": split.images, f"{name}_labels": split.labels}
    # The lock reserves this name. A file that a killed process left there is overwritten.
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            np.savez(file, **members)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        log.warning("the next start decodes again: cannot write %s (%s)", path, error.strerror)


def _decode_all(spec: DatasetSpec, builder: DatasetBuilder) -> Splits:
    return _decode(spec, builder, "train"), _decode(spec, builder, "test")


def _decode(spec: DatasetSpec, builder: DatasetBuilder, split: str) -> Split:
    source = builder.as_data_source(split)
    images = np.empty((len(source), *spec.image_shape), np.uint8)
    labels = np.empty(len(source), np.int32)
    for start in range(0, len(source), 1000):
        indices = range(start, min(start + 1000, len(source)))
        for i, example in zip(indices, source.__getitems__(indices), strict=True):
            if example["image"].shape != spec.image_shape:
                raise DataError(
                    f"--dataset {spec.name}: {builder.data_path} has an image of shape "
                    f"{example['image'].shape}, not {spec.image_shape}; prepare it again"
                )
            images[i], labels[i] = example["image"], example["label"]
    if not np.all((labels >= 0) & (labels < spec.num_classes)):
        raise DataError(
            f"--dataset {spec.name}: {builder.data_path} has a label that is not 0 to "
            f"{spec.num_classes - 1}; prepare it again"
        )
    return Split(images, labels)


def epoch_order(key: jax.Array, epoch: jax.typing.ArrayLike, size: int) -> jax.Array:
    """Returns the order of the examples in an epoch: a permutation of ``range(size)``."""
    return jax.random.permutation(jax.random.fold_in(key, epoch), size)


def train_batch(
    spec: DatasetSpec,
    split: Split,
    order: jax.Array,
    index: int | jax.Array,
    key: jax.Array,
    batch_size: int,
    dtype: jax.typing.DTypeLike,
) -> Batch:
    """Returns batch number ``index`` of an epoch.

    Args:
      spec: the data set.
      split: its training split, on the device.
      order: the order of this epoch, from :func:`epoch_order`.
      index: the number of the batch, in ``range(len(order) // batch_size)``.
      key: the random key for the augmentation of this batch.
      batch_size: the number of examples; static.
      dtype: the dtype of the images.
    """
    chosen = jax.lax.dynamic_slice_in_dim(order, index * batch_size, batch_size)
    images = crop_and_flip(key, split.images, chosen) if spec.augment else split.images[chosen]
    return Batch(normalise(spec, images, dtype), split.labels[chosen], jnp.ones(batch_size, dtype))


def eval_batch(
    spec: DatasetSpec,
    split: Split,
    index: int | jax.Array,
    batch_size: int,
    dtype: jax.typing.DTypeLike,
) -> Batch:
    """Returns batch ``index`` in the order of the file. Past the end is padding of weight zero."""
    positions = index * batch_size + jnp.arange(batch_size)
    chosen = jnp.minimum(positions, len(split.labels) - 1)
    images = normalise(spec, split.images[chosen], dtype)
    return Batch(images, split.labels[chosen], (positions < len(split.labels)).astype(dtype))


def crop_and_flip(key: jax.Array, images: np.ndarray | jax.Array, chosen: jax.Array) -> jax.Array:
    """Pads each image with zeros, crops it at random and flips it at random.

    An eighth of its height is padded on every side, 4 pixels of 32.

    Args:
      key: a random key.
      images: ``(n, height, width, channels)``, of any dtype.
      chosen: ``(batch,)``, the indices of the images to take.

    Returns:
      ``(batch, height, width, channels)``. Each crop, of 9 x 9 for 32 x 32 pixels, is equally
      likely. Half of the images are flipped on average.
    """
    _, height, width, channels = images.shape
    crop_key, flip_key = jax.random.split(key)
    padding = height // 8
    shifts = jax.random.randint(crop_key, (len(chosen), 2), -padding, padding + 1)
    flips = jax.random.bernoulli(flip_key, shape=(len(chosen), 1))
    rows = jnp.arange(height) + shifts[:, :1]
    columns = jnp.where(flips, jnp.arange(width)[::-1], jnp.arange(width)) + shifts[:, 1:]
    rows, columns = rows[:, :, None], columns[:, None, :]
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    # One gather of whole pixels from all images in one long row. On a CPU, selecting images,
    # slicing them and selecting between them and their mirror images costs five times as much.
    pixels = (chosen[:, None, None] * height + rows) * width + columns
    gathered = images.reshape(-1, channels)[jnp.where(inside, pixels, 0)]
    return jnp.where(inside[..., None], gathered, 0)
