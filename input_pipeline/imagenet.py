"""Where ImageNet is: TFDS's ArrayRecord files, or a tree of JPEGs with a folder for each class."""

import os
from typing import NamedTuple, Protocol

import numpy as np

from input_pipeline import prepare
from input_pipeline.errors import DataError
from input_pipeline.sources import data_path
from input_pipeline.specs import DatasetSpec

ENVIRONMENT_VARIABLE = "IMAGENET_PATH"
SUFFIXES = (".jpeg", ".jpg", ".png")


class Record(NamedTuple):
    """An encoded picture and its class."""

    data: bytes
    label: int


class Source(Protocol):
    """Records by number. Worker processes get a copy, so it must be small enough to send."""

    size: int

    def __getitem__(self, index: int) -> Record:
        """Reads one."""

    def name(self, index: int) -> str:
        """What a person would find the record by."""


class Sources(NamedTuple):
    """The two splits."""

    train: Source
    test: Source


class ArrayRecordSource:
    """A split as TFDS stored it."""

    def __init__(self, builder, split: str):
        import tensorflow_datasets as tfds

        undecoded = {"image": tfds.decode.SkipDecoding()}
        self._records = builder.as_data_source(split, decoders=undecoded)
        self.size = len(self._records)

    def __getitem__(self, index: int) -> Record:
        example = self._records[index]
        return Record(example["image"], int(example["label"]))

    def name(self, index: int) -> str:
        """The name of the file that the record was made from."""
        return self._records[index]["file_name"].decode()


class FolderSource:
    """A split as a tree ``<class>/<picture>.JPEG``.

    A million and more names are kept as one array of bytes, which costs little to send.
    """

    def __init__(self, root, classes: dict[str, int]):
        """Lists the pictures.

        Args:
          root: the split's folder, a path that may be in a cloud.
          classes: the label of each folder in it.
        """
        self._root = root
        self._folders = sorted(path.name for path in root.iterdir() if path.is_dir())
        names, folders = [], []
        for number, folder in enumerate(self._folders):
            found = [
                path.name
                for path in (root / folder).iterdir()
                if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
            ]
            names += sorted(found)
            folders += [number] * len(found)
        self._names = np.array([os.fsencode(name) for name in names])
        self._folder = np.array(folders, np.int32)
        self._labels = np.array([classes[folder] for folder in self._folders], np.int32)
        self.size = len(names)

    def __getitem__(self, index: int) -> Record:
        return Record(self._path(index).read_bytes(), int(self._labels[self._folder[index]]))

    def name(self, index: int) -> str:
        """The path of the file."""
        return os.fspath(self._path(index))

    def _path(self, index: int):
        return self._root / self._folders[self._folder[index]] / os.fsdecode(self._names[index])


def find(spec: DatasetSpec, data_dir: str | None = None) -> Sources:
    """Finds both splits.

    Args:
      spec: of ImageNet.
      data_dir: a folder of TFDS that has ``imagenet2012``, or one that has ``train`` and ``val``;
        may begin with ``gs://``. None means ``$IMAGENET_PATH``, else TFDS's own folder.

    Raises:
      DataError: if there is neither, or not in a form that can be read.
    """
    root = data_path(data_dir or os.environ.get(ENVIRONMENT_VARIABLE))
    if (root / spec.tfds_name).is_dir():
        return _prepared(spec, root)
    if (root / "train").is_dir() and (root / "val").is_dir():
        return _folders(spec, root)
    raise DataError(
        f"--data_dir {root}: has neither {spec.tfds_name}, as TensorFlow Datasets prepares it, nor "
        f"folders train and val; give the folder that has, here or in ${ENVIRONMENT_VARIABLE} "
        "(README says how to make one from the original archives)"
    )


def _prepared(spec: DatasetSpec, root) -> Sources:
    import tensorflow_datasets as tfds

    found = prepare.builder_of(spec, root)
    if not found.is_prepared():
        raise DataError(
            f"--data_dir {root}: {spec.tfds_name} is there, but no complete version "
            f"{found.version} of it"
        )
    folder = os.fspath(found.data_path)
    # Made from the folder, a builder knows of the formats that were added to it later.
    builder = tfds.builder_from_directory(folder)
    formats = sorted(file_format.value for file_format in builder.info.available_file_formats())
    if "array_record" not in formats:
        raise DataError(
            f"--data_dir {root}: {spec.tfds_name} is there as {' and '.join(formats)}, which only "
            "TensorFlow reads; where that is installed, run `tfds convert_format "
            f"--dataset_version_dir={folder} --out_file_format=array_record`"
        )
    splits = [split for split in ("train", "validation") if split in builder.info.splits]
    if len(splits) < 2:
        raise DataError(
            f"--data_dir {root}: {spec.tfds_name} has no splits train and validation, only "
            f"{', '.join(builder.info.splits)}"
        )
    return Sources(*(ArrayRecordSource(builder, split) for split in splits))


def _folders(spec: DatasetSpec, root) -> Sources:
    classes = _labels(spec, root)
    sources = []
    for split in ("train", "val"):
        source = FolderSource(root / split, classes)
        if not source.size:
            raise DataError(
                f"--data_dir {root}: {split} has no folders of pictures, one for each class"
            )
        sources.append(source)
    return Sources(*sources)


def _labels(spec: DatasetSpec, root) -> dict[str, int]:
    """The label of each folder: its place among ImageNet's synsets, else among the folders."""
    import tensorflow_datasets as tfds

    folders = {
        path.name
        for split in ("train", "val")
        for path in (root / split).iterdir()
        if path.is_dir()
    }
    synsets = tfds.builder(spec.tfds_name).info.features["label"].names
    names = synsets if folders <= set(synsets) else sorted(folders)
    if len(names) > spec.num_classes:
        raise DataError(
            f"--data_dir {root}: has {len(names)} classes, more than the {spec.num_classes} of "
            f"{spec.name}"
        )
    return {name: label for label, name in enumerate(names)}
