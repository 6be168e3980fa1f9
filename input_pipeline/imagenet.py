"""Finds ImageNet: TFDS's ArrayRecord files, or a tree of JPEGs with a folder for each class."""

from __future__ import annotations

import os
import resource
import shlex
import zlib
from typing import TYPE_CHECKING

import numpy as np
from etils import epath

from input_pipeline import prepared
from input_pipeline.errors import DataError
from input_pipeline.specs import DatasetSpec
from input_pipeline.streaming import Record, Sources

if TYPE_CHECKING:
    from tensorflow_datasets.core import DatasetBuilder

ENVIRONMENT_VARIABLE = "IMAGENET_PATH"
SUFFIXES = (".jpeg", ".jpg", ".png")

# A process opens about so many files besides those of the data.
OTHER_FILES = 256


class ArrayRecordSource:
    """A split as TFDS stored it."""

    def __init__(self, builder: DatasetBuilder, split: str):
        import tensorflow_datasets as tfds

        undecoded = {"image": tfds.decode.SkipDecoding()}
        self._split = split
        self._records = builder.as_data_source(split, decoders=undecoded)
        self.size = len(self._records)
        info = builder.info.splits[split]
        self._sizes = info.num_bytes, info.shard_lengths

    def __getitem__(self, index: int) -> Record:
        try:
            example = self._records[index]
        except RuntimeError as error:  # ArrayRecord raises it where a checksum is wrong.
            raise OSError(str(error)) from error
        return Record(example["image"], int(example["label"]))

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
        return Record(self._path(index).read_bytes(), int(self._labels[self._folder[index]]))

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


def find(spec: DatasetSpec, data_dir: str | None = None) -> Sources:
    """Finds both splits.

    Args:
      spec: the data set.
      data_dir: a folder of TFDS that contains ``imagenet2012``, or a folder that contains
        ``train`` and ``val``. It may begin with ``gs://``. None means ``$IMAGENET_PATH``, else
        TFDS's own folder.

    Raises:
      DataError: if there is neither, or neither in a form that can be read.
    """
    if data_dir is None:
        data_dir = os.environ.get(ENVIRONMENT_VARIABLE) or None
    root = prepared.data_path(data_dir)
    with prepared.reading(root):
        return _find(spec, root)


def _find(spec: DatasetSpec, root: epath.Path) -> Sources:
    if (root / spec.tfds_name).is_dir():
        return _prepared(spec, root)
    if (root / "train").is_dir() and (root / "val").is_dir():
        return _folders(spec, root)
    raise DataError(
        f"--data_dir {root}: has neither {spec.tfds_name}, as TensorFlow Datasets prepares it, nor "
        f"folders train and val; give the folder that has, here or in ${ENVIRONMENT_VARIABLE} "
        "(README says how to make one from the original archives)"
    )


def _prepared(spec: DatasetSpec, root: epath.Path) -> Sources:
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
    classes = tuple(builder.info.features["label"].names)
    train, test = (ArrayRecordSource(builder, split) for split in splits)
    present = {path.name for path in type(root)(folder).iterdir()}
    shards = [name for split in splits for name in builder.info.splits[split].filenames]
    if missing := [name for name in shards if name not in present]:
        raise DataError(
            f"--data_dir {root}: {len(missing)} of {len(shards)} files of {spec.tfds_name} are "
            f"missing, such as {missing[0]}"
        )
    _allow_open_files(len(shards) + OTHER_FILES, root)
    return Sources(train, test, classes)


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


def _folders(spec: DatasetSpec, root: epath.Path) -> Sources:
    splits = {split: _image_names(root / split) for split in ("train", "val")}
    for split, names in splits.items():
        if not names:
            raise DataError(
                f"--data_dir {root}: {split} has no folders of images, one for each class"
            )
    classes = _labels(spec, root, set().union(*splits.values()))
    train, test = (FolderSource(root / s, names, classes) for s, names in splits.items())
    return Sources(train, test, tuple(classes))


def _image_names(folder: epath.Path) -> dict[str, list[str]]:
    """Returns the sorted names of the images in each subfolder that has any, in sorted order."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith("."):
            files = (p.name for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
            if names := sorted(name for name in files if not name.startswith(".")):
                found[path.name] = names
    return found


def _labels(spec: DatasetSpec, root: epath.Path, folders: set[str]) -> dict[str, int]:
    """Returns each folder's label: its index among ImageNet's synsets, else among the folders."""
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
    return {name: label for label, name in enumerate(others or synsets)}
