"""Finds ImageNet: TFDS's ArrayRecord files, or a tree of JPEGs with a folder for each class."""

from __future__ import annotations

import os
import resource
import shlex
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from etils import epath

from input_pipeline import prepared
from input_pipeline.classes import are_numbers, labels, ordered
from input_pipeline.errors import DataError
from input_pipeline.folders import sources, tree
from input_pipeline.jpeg import UnreadableError
from input_pipeline.specs import DatasetSpec
from input_pipeline.streaming import Record, Sources

if TYPE_CHECKING:
    from tensorflow_datasets.core import DatasetBuilder

ENVIRONMENT_VARIABLE = "IMAGENET_PATH"

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
        self._folder = os.fspath(builder.data_path)
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
            return self.place(index)

    def place(self, index: int) -> str:
        """Returns its number and where its split is."""
        return f"record {index} of {self._split} in {self._folder}"

    def fingerprint(self) -> int:
        """Returns a number that follows from the sizes of the split and of its files."""
        return zlib.crc32(repr(self._sizes).encode())


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
        with prepared.understanding(spec, root):
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
    classes = prepared.class_names(spec, builder)
    if are_numbers(classes):
        raise DataError(f"{folder}: has no label.labels.txt with the names of its classes")
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
    train, test = (tree(root / split) for split in ("train", "val"))
    folders = {*train.names, *test.names}
    return sources(root, train, test, known or _classes(spec, root, folders))


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
    return ordered(others) or list(synsets)
