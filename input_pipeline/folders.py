"""Trees of images with a folder for each class: ``train/<class>/<image>`` and ``val/...``."""

from __future__ import annotations

import logging
import math
import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from etils import epath

from input_pipeline import cloud, jpeg, prepared
from input_pipeline.classes import are_numbers, labels, ordered
from input_pipeline.cores import cores
from input_pipeline.errors import MAX_UNREADABLE, DataError
from input_pipeline.resident import Arrays, Split
from input_pipeline.specs import DatasetSpec
from input_pipeline.streaming import Record, Source, Sources, make_example

log = logging.getLogger(__name__)

# Of what OpenCV decodes.
SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".jp2", ".avif")

# One in so many images of a class is for testing where there is no folder val.
HELD_OUT = 10

# Up to so many bytes of pixels are held on every device. The same on all machines, since a run is
# to be the same on all, and streamed images are cropped in another way.
RESIDENT_BYTES = 2**31


class Tree(NamedTuple):
    """The images of a split.

    Attributes:
      root: the folder that has a folder for each class. It may be in a bucket.
      names: the sorted names of the files in each of its folders, in sorted order.
    """

    root: epath.Path
    names: dict[str, list[str]]


class FolderSource:
    """A split as a tree ``<class>/<image>.JPEG``.

    Its names, more than a million, are kept as one array of bytes, which is cheap to send.
    """

    def __init__(self, tree: Tree, classes: dict[str, int]):
        """Keeps the names.

        Args:
          tree: the images.
          classes: the label of each folder.
        """
        self._root, names = tree
        self._folders = list(names)
        sizes = [len(files) for files in names.values()]
        self._names = np.array([os.fsencode(file) for files in names.values() for file in files])
        self._folder = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
        self._labels = np.array([classes[folder] for folder in self._folders], np.int32)
        self.size = len(self._names)

    def __getitem__(self, index: int) -> Record:
        path = self._path(index)
        with cloud.failing_as_files_do(path):
            return Record(path.read_bytes(), int(self._labels[self._folder[index]]))

    def name(self, index: int) -> str:
        """Returns the path of the file."""
        return os.fspath(self._path(index))

    place = name

    def fingerprint(self) -> int:
        """Returns a number that follows from the names of the files and their classes."""
        names = zlib.crc32(b"\n".join(self._names), zlib.crc32(repr(self._folders).encode()))
        return zlib.crc32(self._labels[self._folder].data, names)

    def _path(self, index: int) -> epath.Path:
        folder: str = self._folders[self._folder[index]]
        return self._root / folder / os.fsdecode(self._names[index])


def tree(folder: epath.Path) -> Tree:
    """Finds the images of a split.

    Raises:
      DataError: if there are no subfolders, or one has no images, or is a link that leads nowhere.
    """
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.is_file():
            continue
        if not path.is_dir():
            raise DataError(f"--data_dir {path}: a link that leads nowhere; remove it")
        files = (p.name for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
        found[path.name] = sorted(name for name in files if not name.startswith("."))
        if not found[path.name]:
            raise DataError(
                f"--data_dir {path}: a class without images (files that end in "
                f"{' '.join(SUFFIXES)}); add some, or remove it"
            )
    if not found:
        raise DataError(
            f"--data_dir {folder.parent}: {folder.name} has no folders of images, one for each "
            "class"
        )
    return Tree(folder, found)


def sources(root: epath.Path, train: Tree, test: Tree, classes: Sequence[str]) -> Sources:
    """Returns both splits, labelled by these classes; raises DataError if there are others."""
    folders = ordered({*train.names, *test.names})
    of_folder = dict(zip(folders, labels(folders, classes, f"--data_dir {root}"), strict=True))
    if are_numbers(folders):
        log.info("--data_dir %s: the classes are numbers, and in their order", root)
    return Sources(FolderSource(train, of_folder), FolderSource(test, of_folder), tuple(classes))


def find(data_dir: epath.PathLike, known: Sequence[str] = ()) -> Sources:
    """Finds the training and the test images of any folder.

    Where there is no folder ``val``, a tenth of each class of ``train`` is for testing and not for
    training: the files whose names have the smallest checksums, so the same in every copy.

    Args:
      data_dir: the folder, which contains ``train`` and perhaps ``val``. It may begin with
        ``gs://``.
      known: the classes that a network was trained on, in the order of its labels; by default,
        those of ``train`` are in the order of their names.

    Raises:
      DataError: if there are no images, or images of other classes.
    """
    root = prepared.data_path(data_dir)
    with prepared.reading(root):
        if not (root / "train").is_dir():
            raise DataError(f"--data_dir {root}: has no folder train, with a folder for each class")
        train = tree(root / "train")
        if (root / "val").is_dir():
            test = tree(root / "val")
        else:
            train, test = _held_out(train)
            log.info(
                "--data_dir %s: has no folder val; a tenth of each class of train is for testing",
                root,
            )
        return sources(root, train, test, known or ordered(train.names))


def _held_out(whole: Tree) -> tuple[Tree, Tree]:
    """Splits the images of each class into those for training and those for testing."""
    train, test = {}, {}
    for folder, names in whole.names.items():
        by_checksum = sorted(names, key=lambda name: zlib.crc32(os.fsencode(name)))
        count = math.ceil(len(names) / HELD_OUT)
        if count == len(names):
            raise DataError(
                f"--data_dir {whole.root / folder}: one image is too few to train and to test; add "
                "some, or a folder val"
            )
        train[folder], test[folder] = sorted(by_checksum[count:]), sorted(by_checksum[:count])
    return whole._replace(names=train), whole._replace(names=test)


def fits(spec: DatasetSpec, found: Sources) -> bool:
    """Returns whether the images are few and small enough to be held on every device."""
    return (found.train.size + found.test.size) * math.prod(spec.image_shape) <= RESIDENT_BYTES


def decoded(spec: DatasetSpec, found: Sources) -> Arrays:
    """Decodes all images, their central square at the size of the data set's.

    Images that cannot be decoded are named and left out.

    Raises:
      DataError: if they are more than one in a hundred, or a file cannot be read.
    """
    log.info("decoding %s images", f"{found.train.size + found.test.size:,}")
    return Arrays(_decode(spec, found.train), _decode(spec, found.test), found.classes)


def _decode(spec: DatasetSpec, source: Source) -> Split:
    images = np.empty((source.size, *spec.image_shape), np.uint8)
    labels = np.empty(source.size, np.int32)
    readable = np.empty(source.size, bool)

    def decode(index: int) -> None:
        example = make_example(source, index, jpeg.central_window, spec.image_shape[0])
        images[index], labels[index] = example["image"], example["label"]
        readable[index] = example["weight"] > 0

    with ThreadPoolExecutor(cores()) as pool:
        # Ends at the first error, and begins nothing more.
        for _ in pool.map(decode, range(source.size)):
            pass
    unreadable = np.flatnonzero(~readable)
    for index in unreadable:
        log.warning("left out, as it cannot be read: %s", source.name(int(index)))
    if len(unreadable) > MAX_UNREADABLE * source.size:
        raise DataError(
            f"{len(unreadable):,} of {source.size:,} images could not be decoded, more than "
            f"{MAX_UNREADABLE:.0%}"
        )
    return Split(images[readable], labels[readable]) if len(unreadable) else Split(images, labels)
