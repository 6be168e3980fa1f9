"""Whole small data sets as uint8 arrays: bundled digits, or a prepared TFDS folder."""

import hashlib
import json
import logging
import os
import zipfile
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from etils import epath

from input_pipeline import prepare
from input_pipeline.errors import DataError
from input_pipeline.specs import DatasetSpec

log = logging.getLogger(__name__)


class Split(NamedTuple):
    """Pictures ``(n, height, width, channels)`` uint8 with labels ``(n,)`` int32."""

    images: np.ndarray
    labels: np.ndarray

    @property
    def size(self) -> int:
        """The number of examples."""
        return len(self.labels)


SPLITS = ("train", "test")
Splits = tuple[Split, Split]


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


def data_path(data_dir: str | os.PathLike | None = None) -> epath.Path:
    """The folder of TFDS: the one given, else ``$TFDS_DATA_DIR``, else ``~/tensorflow_datasets``.

    It may be in a cloud, ``gs://bucket/folder``; TFDS and ArrayRecord read it there.

    Raises:
      DataError: if it is the name of a file, or empty.
    """
    if data_dir is None:
        data_dir = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    if not data_dir:
        raise DataError("--data_dir: an empty name is no folder; leave the flag out, or give one")
    path = epath.Path(data_dir).expanduser()
    if os.path.isfile(path):
        raise DataError(f"--data_dir {path}: is a file; give a folder")
    return path


def load(spec: DatasetSpec, data_dir: str | os.PathLike | None = None) -> Arrays:
    """Loads a small data set, preparing it first where it is not there yet.

    Args:
      spec: which one.
      data_dir: where TFDS keeps prepared data; None means as in :func:`data_path`.

    Raises:
      DataError: if it is neither prepared nor to be downloaded, or is not what it should be.
    """
    if not spec.stored:
        return _digits()
    folder = data_path(data_dir)
    prepare.check_available(spec, folder)
    if "://" in os.fspath(folder):
        # There are no locks in a cloud, nor caches beside the data.
        builder = prepare.prepared_builder(spec, folder)
        return Arrays(*_decode_all(spec, builder), _classes(builder))
    # One process prepares and decodes; others that start meanwhile wait and read its cache.
    with _lock(Path(folder) / f".{spec.tfds_name}.lock"):
        builder = prepare.prepared_builder(spec, folder)
        return Arrays(*_decoded(spec, builder), _classes(builder))


def _classes(builder) -> tuple[str, ...]:
    return tuple(builder.info.features["label"].names)


def _digits() -> Arrays:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int32)
    # The file is ordered by writer. RandomState's streams are frozen: the split never changes.
    order = np.random.RandomState(0).permutation(len(labels))
    train, test = order[:-360], order[-360:]
    splits = (Split(images[part], labels[part]) for part in (train, test))
    return Arrays(*splits, classes=tuple(map(str, bunch.target_names)))


@contextmanager
def _lock(path: Path):
    """Holds a lock file, or nothing where none can be made (a read-only folder)."""
    import filelock

    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(path) if os.access(path.parent, os.W_OK) else nullcontext():
        yield


def _decoded(spec: DatasetSpec, builder) -> Splits:
    """The pictures of a prepared data set, from the cache beside it where that is current."""
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
    """Changes whenever a file of the prepared data set does."""
    files = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in folder.iterdir())
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def _read_cache(path: Path, fingerprint: str) -> Splits | None:
    try:
        with np.load(path, allow_pickle=False) as stored:
            if str(stored["fingerprint"]) != fingerprint:
                return None
            # Reading a member to its end checks its CRC: a damaged file is an error here.
            train, test = (Split(stored[f"{s}_images"], stored[f"{s}_labels"]) for s in SPLITS)
            return train, test
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        log.warning("decoding again: %s is damaged (%s)", path, error)
        return None


def _write_cache(path: Path, fingerprint: str, splits: Splits) -> None:
    members = {"fingerprint": np.array(fingerprint)}
    for name, split in zip(SPLITS, splits, strict=True):
        members |= {f"{name}_images": split.images, f"{name}_labels": split.labels}
    # The lock makes this name ours, and what a killed process left there is overwritten.
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


def _decode_all(spec: DatasetSpec, builder) -> Splits:
    return _decode(spec, builder, "train"), _decode(spec, builder, "test")


def _decode(spec: DatasetSpec, builder, split: str) -> Split:
    source = builder.as_data_source(split)
    images = np.empty((len(source), *spec.image_shape), np.uint8)
    labels = np.empty(len(source), np.int32)
    for start in range(0, len(source), 1000):
        indices = range(start, min(start + 1000, len(source)))
        for i, example in zip(indices, source.__getitems__(indices), strict=True):
            if example["image"].shape != spec.image_shape:
                raise DataError(
                    f"--dataset {spec.name}: {builder.data_path} has a picture of shape "
                    f"{example['image'].shape}, not {spec.image_shape}; prepare it again"
                )
            images[i], labels[i] = example["image"], example["label"]
    return Split(images, labels)
