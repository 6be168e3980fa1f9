"""Finds ImageNet: TFDS's ArrayRecord files, or a tree of JPEGs with a folder for each class."""

from __future__ import annotations

import logging
import os
import resource
import shlex
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from etils import epath

from input_pipeline import cloud, prepared
from input_pipeline.classes import are_numbers, labels, ordered
from input_pipeline.errors import DataError
from input_pipeline.jpeg import UnreadableError
from input_pipeline.specs import DatasetSpec
from input_pipeline.streaming import Record, Sources

if TYPE_CHECKING:
    from tensorflow_datasets.core import DatasetBuilder

log = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "IMAGENET_PATH"
# Of what OpenCV decodes.
SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".jp2", ".avif")

# What ArrayRecord says where a checksum is wrong.
DAMAGE = "Corrupted"

# A process opens about so many files besides those of the data.
OTHER_FILES = 256


class ArrayRecordSource:
    """A split as TFDS stored it."""

    def __init__(self, builder: DatasetBuilder, split: str, labels: Sequence[int]):
        """Opens the split.

        Args:
          builder: the data set.
          split: the name of the split.
          labels: the label of each of its classes.
        """
        import tensorflow_datasets as tfds

        undecoded = {"image": tfds.decode.SkipDecoding()}
        self._split, self._labels = split, labels
        self._records = builder.as_data_source(split, decoders=undecoded)
        self.size = len(self._records)
        info = builder.info.splits[split]
        self._sizes = info.num_bytes, info.shard_lengths

    def __getitem__(self, index: int) -> Record:
        try:
            example = self._records[index]
        except RuntimeError as error:  # ArrayRecord raises it for whatever goes wrong.
            if DAMAGE in str(error):
                raise UnreadableError(str(error)) from error
            raise OSError(str(error)) from error
        return Record(example["image"], self._labels[int(example["label"])])

    def name(self, index: int) -> str:
        """Returns the name of the file that the record was made from."""
        try:
            file_name: bytes = self._records[index]["file_name"]
            return file_name.decode()
        except RuntimeError:
            return f"record {index} of {self._split}"

    def fingerprint(self) -> int:
        """Returns a number that follows from the sizes of the split and of its files."""
        return zlib.crc32(repr(self._sizes).encode())


class FolderSource:
    """A split as a tree ``<class>/<image>.JPEG``.

    Its names, more than a million, are kept as one array of bytes, which is cheap to send.
    """

    def __init__(self, root: epath.Path, names: dict[str, list[str]], classes: dict[str, int]):
        """Keeps the names.

        Args:
          root: the folder of the split, which may be in a bucket.
          names: the names of the files in each of its folders.
          classes: the label of each folder.
        """
        self._root = root
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

    def fingerprint(self) -> int:
        """Returns a number that follows from the names of the files and their classes."""
        names = zlib.crc32(b"\n".join(self._names), zlib.crc32(repr(self._folders).encode()))
        return zlib.crc32(self._labels[self._folder].data, names)

    def _path(self, index: int) -> epath.Path:
        folder: str = self._folders[self._folder[index]]
        return self._root / folder / os.fsdecode(self._names[index])


def find(
    spec: DatasetSpec, data_dir: epath.PathLike | None = None, known: Sequence[str] = ()
) -> Sources:
    """Finds both splits.

    Args:
      spec: the data set.
      data_dir: a folder of TFDS that contains ``imagenet2012``, or a folder that contains
        ``train`` and ``val``. It may begin with ``gs://``. None means ``$IMAGENET_PATH``, else
        TFDS's own folder.
      known: the classes that a network was trained on, in the order of its labels; by default,
        those of the data are in the order of TFDS or of the folders' names.

    Raises:
      DataError: if there is neither, or neither in a form that can be read, or with other classes.
    """
    if data_dir is None:
        data_dir = os.environ.get(ENVIRONMENT_VARIABLE) or None
    root = prepared.data_path(data_dir)
    with prepared.reading(root):
        return _find(spec, root, known)


def _find(spec: DatasetSpec, root: epath.Path, known: Sequence[str]) -> Sources:
    if (root / spec.tfds_name).is_dir():
        return _prepared(spec, root, known)
    if (root / "train").is_dir() and (root / "val").is_dir():
        return _folders(spec, root, known)
    raise DataError(
        f"--data_dir {root}: has neither {spec.tfds_name}, as TensorFlow Datasets prepares it, nor "
        f"folders train and val; give the folder that has, here or in ${ENVIRONMENT_VARIABLE} "
        "(README says how to make one from the original archives)"
    )


def _prepared(spec: DatasetSpec, root: epath.Path, known: Sequence[str]) -> Sources:
    import tensorflow_datasets as tfds

    found = prepared.builder_of(spec, root)
    if not found.is_prepared():
        raise DataError(
            f"--data_dir {root}: {spec.tfds_name} is there, but no complete version "
            f"{found.version} of it"
        )
    folder = os.fspath(found.data_path)
    # A builder made from the folder knows of the formats that were added to it later.
    builder = tfds.builder_from_directory(folder)
    formats = sorted(file_format.value for file_format in builder.info.available_file_formats())
    if "array_record" not in formats:
        raise DataError(
            f"--data_dir {root}: {spec.tfds_name} is there as {' and '.join(formats)}, which only "
            "TensorFlow reads; where that is installed, run `tfds convert_format "
            f"--dataset_version_dir={shlex.quote(folder)} --out_file_format=array_record`"
        )
    splits = [split for split in ("train", "validation") if split in builder.info.splits]
    if len(splits) < 2:
        raise DataError(
            f"--data_dir {root}: {spec.tfds_name} has no splits train and validation, only "
            f"{', '.join(builder.info.splits)}"
        )
    classes = builder.info.features["label"].names
    of_class = labels(classes, known, f"--data_dir {root}")
    train, test = (ArrayRecordSource(builder, split, of_class) for split in splits)
    present = {path.name for path in type(root)(folder).iterdir()}
    shards = [name for split in splits for name in builder.info.splits[split].filenames]
    if missing := [name for name in shards if name not in present]:
        raise DataError(
            f"--data_dir {root}: {len(missing)} of {len(shards)} files of {spec.tfds_name} are "
            f"missing, such as {missing[0]}"
        )
    _allow_open_files(len(shards) + OTHER_FILES, root)
    return Sources(train, test, tuple(known or classes))


def _allow_open_files(count: int, root: epath.Path) -> None:
    """Raises this process's limit of open files, which its workers inherit, where it is lower.

    Whoever reads ArrayRecord keeps every file open, and ImageNet has more than the usual limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if hard != unlimited and hard < count:
        raise DataError(
            f"--data_dir {root}: reading it takes up to {count} open files, and this system allows "
            f"{hard}; have its hard limit raised (`ulimit -Hn`)"
        )
    if soft != unlimited and soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


def _folders(spec: DatasetSpec, root: epath.Path, known: Sequence[str]) -> Sources:
    splits = {split: _image_names(root / split) for split in ("train", "val")}
    for split, names in splits.items():
        if not names:
            raise DataError(
                f"--data_dir {root}: {split} has no folders of images, one for each class"
            )
    folders = set().union(*splits.values())
    known = known or _classes(spec, root, folders)
    present = ordered(folders)
    classes = dict(zip(present, labels(present, known, f"--data_dir {root}"), strict=True))
    train, test = (FolderSource(root / s, names, classes) for s, names in splits.items())
    return Sources(train, test, tuple(known))


def _image_names(folder: epath.Path) -> dict[str, list[str]]:
    """Returns the sorted names of the images in each subfolder, in sorted order.

    Raises:
      DataError: if a subfolder has no images, or is a link that leads nowhere.
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
    return found


def _classes(spec: DatasetSpec, root: epath.Path, folders: set[str]) -> list[str]:
    """Returns the classes in the order of their labels: ImageNet's synsets, else the folders."""
    import tensorflow_datasets as tfds

    synsets = tfds.builder(spec.tfds_name).info.features["label"].names
    others = sorted(folders.difference(synsets))
    if others and len(others) < len(folders):
        raise DataError(
            f"--data_dir {root}: has folders of ImageNet's classes, and beside them "
            f"{', '.join(others[:5])}{', ...' if len(others) > 5 else ''}; move these away"
        )
    if len(others) > spec.num_classes:
        raise DataError(
            f"--data_dir {root}: has {len(others)} classes, more than the {spec.num_classes} of "
            f"{spec.name}"
        )
    if others and are_numbers(others):
        log.info("--data_dir %s: the classes are numbers, and in their order", root)
    return ordered(others) or list(synsets)
