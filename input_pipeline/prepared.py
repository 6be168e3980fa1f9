"""Finds folders that TFDS prepared, or downloads and prepares them without TensorFlow.

TFDS's own builders of these data sets read files and encode images through TensorFlow. So the
download (checksums included), the features and the record format are TFDS's, but the archives
are read here. Images are handed over as PIL images, which TFDS encodes without TensorFlow.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import os
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from etils import epath

from input_pipeline import cloud
from input_pipeline.errors import DataError
from input_pipeline.specs import DatasetSpec

if TYPE_CHECKING:
    from PIL import Image
    from tensorflow_datasets.core import DatasetBuilder, DatasetInfo

PROBE_SECONDS = 6.0

# The most of an error of TFDS that is passed on.
REASON_CHARACTERS = 200

# (key, example) pairs, as TFDS builders generate them.
Examples: TypeAlias = Iterator[tuple[int | str, dict[str, Any]]]
# Reads the downloaded archives of a data set, given their paths, and returns its splits.
Reader: TypeAlias = Callable[[dict[str, Path], "DatasetInfo"], dict[str, Examples]]


def data_path(data_dir: epath.PathLike | None = None) -> epath.Path:
    """Returns the folder of TFDS: ``data_dir``, ``$TFDS_DATA_DIR`` or ``~/tensorflow_datasets``.

    It may be in a bucket, ``gs://bucket/folder``, where TFDS and ArrayRecord read it.

    Raises:
      DataError: if the name is that of a file, or empty, or of a bucket or folder that cannot be
        looked into.
    """
    if data_dir is None:
        data_dir = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    if not data_dir:
        raise DataError("--data_dir: an empty name is no folder")
    if reason := cloud.obstacle(data_dir):
        raise DataError(f"--data_dir {data_dir}: {reason}")
    path = epath.Path(data_dir).expanduser()
    if os.fspath(path).startswith("~"):
        raise DataError(f"--data_dir {path}: the home folder of that user is unknown")
    if os.path.isfile(path):
        raise DataError(f"--data_dir {path}: is a file; give a folder")
    if not cloud.is_remote(path):
        try:
            os.scandir(path).close()
        except FileNotFoundError:
            pass
        except OSError as error:
            raise DataError(f"--data_dir {path}: {error.strerror}") from error
    return path


@contextlib.contextmanager
def reading(data_dir: epath.PathLike) -> Iterator[None]:
    """Raises DataError for whatever the system, or the clients of a bucket, raise."""
    try:
        with cloud.failing_as_files_do(data_dir):
            yield
    except OSError as error:
        raise DataError(f"--data_dir {error.filename or data_dir}: {error.strerror}") from error


@contextlib.contextmanager
def understanding(spec: DatasetSpec, data_dir: epath.PathLike) -> Iterator[None]:
    """Raises DataError for whatever TFDS and ArrayRecord raise over a folder that is damaged.

    Of a bucket that cannot be read, :func:`reading` says so.
    """
    try:
        with cloud.failing_as_files_do(data_dir):
            yield
    except Exception as error:
        if isinstance(error, DataError) or (
            isinstance(error, OSError) and cloud.is_remote(data_dir)
        ):
            raise
        cause = error.__cause__ or error  # TFDS wraps some, at length.
        reason = " ".join(str(cause).split())[:REASON_CHARACTERS]
        raise DataError(
            f"--data_dir {data_dir}: {spec.tfds_name} is there, but cannot be read ({reason}); it "
            "is damaged, or of another version of TFDS: move it away, and prepare it again"
        ) from error


def class_names(spec: DatasetSpec, builder: DatasetBuilder) -> tuple[str, ...]:
    """Returns the name of each class, in the order of the labels; raises DataError if some lack."""
    names = tuple(builder.info.features["label"].names)
    if len(set(names)) != spec.num_classes:
        raise DataError(
            f"{builder.data_path}: names {len(set(names))} classes in label.labels.txt, and not "
            f"{spec.num_classes}; prepare it again"
        )
    return names


def check_available(spec: DatasetSpec, data_dir: epath.PathLike) -> None:
    """Checks within seconds whether :func:`prepared_builder` can succeed.

    Raises:
      DataError: if the data set is in a format that needs TensorFlow, or is neither prepared nor
        can be downloaded.
    """
    builder = builder_of(spec, data_dir)
    if not builder.is_prepared():
        if spec.tfds_name not in ARCHIVES:
            raise DataError(
                f"--dataset {spec.name}: not prepared in {data_dir}; only TFDS itself can, with "
                f"TensorFlow: `tfds build {spec.tfds_name} --data_dir DIR --file_format "
                "array_record`"
            )
        url = next(iter(builder.url_infos))
        if not _reachable(url):
            raise DataError(
                f"--dataset {spec.name}: not prepared in {data_dir}, and {url} cannot be reached; "
                f"run `./run prepare {spec.name} --data_dir DIR` where it can, "
                "then give that DIR as --data_dir"
            )
    elif (found := builder.info.file_format.value) != "array_record":
        raise DataError(
            f"--data_dir {data_dir}: {spec.tfds_name} is there as {found}, "
            "which only TensorFlow reads; give another folder and it will be prepared there"
        )


def prepared_builder(
    spec: DatasetSpec, data_dir: epath.PathLike, splits: dict[str, Examples] | None = None
) -> DatasetBuilder:
    """Returns TFDS's builder of a data set, which it downloads and prepares if necessary.

    Args:
      spec: the data set.
      data_dir: the folder of TFDS, which may be in a bucket.
      splits: the examples of each split; by default, those of the archives that TFDS downloads.

    Raises:
      DataError: if the download fails or the folder cannot be written.
    """
    from tensorflow_datasets.core.download import DownloadError
    from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

    builder = builder_of(spec, data_dir)
    if not builder.is_prepared():
        if splits is None:
            urls = {url.rsplit("/", 1)[-1]: url for url in builder.url_infos}
            read = ARCHIVES[spec.tfds_name]
            builder._split_generators = lambda downloads: read(
                downloads.download(urls), builder.info
            )
        else:
            builder._split_generators = lambda _: splits
        try:
            builder.download_and_prepare()
        except (
            *(OSError, tarfile.TarError, DownloadError, NonMatchingChecksumError),
            # TFDS and the readers raise these for files with unexpected content.
            *(AssertionError, LookupError, RuntimeError, ValueError),
        ) as error:
            reason = " ".join(str(error).split())
            raise DataError(
                f"--data_dir {data_dir}: cannot prepare {spec.name} there: {reason}"
            ) from error
    return builder


def builder_of(spec: DatasetSpec, data_dir: epath.PathLike) -> DatasetBuilder:
    """Returns TFDS's builder of a data set, in the prepared format, else for ArrayRecord.

    Raises:
      DataError: if TFDS would look for the data elsewhere.
    """
    import tensorflow_datasets as tfds

    if "[" in cloud.absolute(data_dir):
        raise DataError(
            f"--data_dir {data_dir}: has [ in its name or above it, which TFDS takes for a "
            "pattern; give another folder, or a link to it"
        )
    # TFDS would warn of an absent folder, which is reported here.
    logging.getLogger("absl").setLevel(logging.ERROR)
    with understanding(spec, data_dir):
        _check_features(epath.Path(data_dir) / spec.tfds_name)
        builder = tfds.builder(spec.tfds_name, data_dir=data_dir)
        if builder.is_prepared():
            return builder
        return tfds.builder(spec.tfds_name, data_dir=data_dir, file_format="array_record")


def _check_features(folder: epath.Path) -> None:
    """Raises ValueError if a description of features names a module that is not TFDS's own.

    TFDS would import it.
    """

    def check(value: object) -> None:
        if isinstance(value, list):
            value = dict(enumerate(value))
        if not isinstance(value, dict):
            return
        for key, part in value.items():
            named = key in ("pythonClassName", "python_class_name", "type")
            if named and isinstance(part, str) and not part.startswith("tensorflow_datasets."):
                raise ValueError(f"features.json names {part}, which is not TFDS's own")
            check(part)

    for path in folder.glob("*/features.json"):
        check(json.loads(path.read_text()))


def _reachable(url: str) -> bool:
    """Returns whether anything answers at ``url``. TFDS would retry for minutes to find out."""
    import requests

    answered = threading.Event()

    def ask() -> None:
        try:
            requests.head(url, timeout=PROBE_SECONDS)
        except requests.RequestException:
            return
        answered.set()

    # In a thread, since looking up a name has no timeout of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answered.is_set()


def _mnist(paths: dict[str, Path], info: DatasetInfo) -> dict[str, Examples]:
    del info

    def examples(prefix: str) -> Examples:
        pixels = gzip.decompress(paths[f"{prefix}-images-idx3-ubyte.gz"].read_bytes())[16:]
        labels = gzip.decompress(paths[f"{prefix}-labels-idx1-ubyte.gz"].read_bytes())[8:]
        images = np.frombuffer(pixels, np.uint8).reshape(-1, 28, 28)
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield i, {"image": _as_image(image), "label": label}

    return {"train": examples("train"), "test": examples("t10k")}


def _cifar(members: dict[str, list[str]], names: dict[str, str]) -> Reader:
    """Returns a reader of CIFAR's binary archives.

    Args:
      members: the files of the archive that make up each split.
      names: the file of class names for each label, in the order of the labels' bytes.
    """

    def read(paths: dict[str, Path], info: DatasetInfo) -> dict[str, Examples]:
        (path,) = paths.values()
        with tarfile.open(path) as archive:
            files = {
                Path(m.name).name: file.read()
                for m in archive
                if m.isfile() and (file := archive.extractfile(m))
            }
        for label, name in names.items():
            info.features[label].names = files[name].decode().split()

        def examples(split: str) -> Examples:
            data = np.frombuffer(b"".join(files[f] for f in members[split]), np.uint8)
            for i, record in enumerate(data.reshape(-1, len(names) + 3 * 32 * 32)):
                labels = dict(zip(names, record.tolist(), strict=False))
                pixels = record[len(names) :].reshape(3, 32, 32).transpose(1, 2, 0)
                yield i, {"id": f"{split}_{i:05d}", "image": _as_image(pixels), **labels}

        return {split: examples(split) for split in members}

    return read


def _as_image(pixels: np.ndarray) -> Image.Image:
    from PIL import Image

    return Image.fromarray(np.ascontiguousarray(pixels))


ARCHIVES: dict[str, Reader] = {
    "mnist": _mnist,
    "cifar10": _cifar(
        {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]},
        {"label": "batches.meta.txt"},
    ),
    "cifar100": _cifar(
        {"train": ["train.bin"], "test": ["test.bin"]},
        {"coarse_label": "coarse_label_names.txt", "label": "fine_label_names.txt"},
    ),
}
