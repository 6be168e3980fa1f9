"""TFDS-prepared folders: found, or downloaded and prepared without TensorFlow.

``./run prepare cifar10 --data_dir DIR`` prepares one by itself, for machines
whose training nodes have no network.

TFDS's own builders of these data sets read files and encode pictures through TensorFlow. So the
download (checksums included), the features and the record format are TFDS's, while the archives
are read here, and pictures are handed over as PIL images, which TFDS encodes without TensorFlow.
"""

import gzip
import io
import logging
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from tyro.conf import Positional

from input_pipeline.command_line import FOLDER, parse
from input_pipeline.errors import DataError
from input_pipeline.specs import SPECS, DatasetSpec

log = logging.getLogger(__name__)

PROBE_SECONDS = 6.0

IMAGENET_TARS = IMAGENET_TRAIN, IMAGENET_VALIDATION = (
    "ILSVRC2012_img_train.tar",
    "ILSVRC2012_img_val.tar",
)
IMAGENET_SIZES = {"train": 1_281_167, "validation": 50_000}

# What can be prepared.
PREPARED = tuple(name for name, spec in SPECS.items() if spec.stored)

# (key, example) pairs, as TFDS builders generate them.
Examples = Iterator[tuple[int, dict]]


def check_available(spec: DatasetSpec, data_dir) -> None:
    """Finds out within seconds whether :func:`prepared_builder` can succeed.

    Raises:
      DataError: if the data set is in a format that needs TensorFlow, or absent and not to be had.
    """
    builder = builder_of(spec, data_dir)
    if not builder.is_prepared():
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


def prepared_builder(spec: DatasetSpec, data_dir, splits: dict[str, Examples] | None = None):
    """Returns TFDS's builder of a data set, downloaded and prepared if it was not yet.

    Args:
      spec: which one.
      data_dir: the folder of TFDS, a path that may be in a cloud.
      splits: the examples of each split; by default those of the archives that TFDS downloads.

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
            # What TFDS and the readers have for files that are not what they should be.
            *(AssertionError, LookupError, RuntimeError, ValueError),
        ) as error:
            reason = " ".join(str(error).split())
            raise DataError(
                f"--data_dir {data_dir}: cannot prepare {spec.name} there: {reason}"
            ) from error
    return builder


def prepare_imagenet(tars: Path | None, data_dir) -> None:
    """Prepares ImageNet from the two archives in ``tars``, unless it is prepared already.

    Raises:
      DataError: if an archive is missing or damaged, or the folder cannot be written.
    """
    spec = SPECS["imagenet"]
    if builder_of(spec, data_dir).is_prepared():
        return
    missing = [n for n in IMAGENET_TARS if tars is None or not (tars / n).is_file()]
    if missing:
        raise DataError(
            f"--tars {tars}: has no {' and no '.join(missing)}; download what is missing from "
            "image-net.org and give its folder"
        )
    builder = prepared_builder(spec, data_dir, _imagenet(tars))
    for split, expected in IMAGENET_SIZES.items():
        if (found := builder.info.splits[split].num_examples) != expected:
            log.warning(
                "%s has %s pictures, and not %s; was an archive cut off?", split, found, expected
            )


def builder_of(spec: DatasetSpec, data_dir):
    """TFDS's builder of a data set, of whatever format is prepared, else of ArrayRecord."""
    import tensorflow_datasets as tfds

    # TFDS would warn of the folder that is absent, of which we speak ourselves.
    logging.getLogger("absl").setLevel(logging.ERROR)
    builder = tfds.builder(spec.tfds_name, data_dir=data_dir)
    if builder.is_prepared():
        return builder
    return tfds.builder(spec.tfds_name, data_dir=data_dir, file_format="array_record")


def _reachable(url: str) -> bool:
    """Whether anything answers at ``url``. TFDS would retry for minutes to find out."""
    import requests

    answered = threading.Event()

    def ask():
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


def _mnist(paths: dict[str, Path], info) -> dict[str, Examples]:
    del info

    def examples(prefix: str) -> Examples:
        pixels = gzip.decompress(paths[f"{prefix}-images-idx3-ubyte.gz"].read_bytes())[16:]
        labels = gzip.decompress(paths[f"{prefix}-labels-idx1-ubyte.gz"].read_bytes())[8:]
        pictures = np.frombuffer(pixels, np.uint8).reshape(-1, 28, 28)
        for i, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
            yield i, {"image": _picture(picture), "label": label}

    return {"train": examples("train"), "test": examples("t10k")}


def _cifar(members: dict[str, list[str]], names: dict[str, str]) -> Callable:
    """A reader of CIFAR's binary archives.

    Args:
      members: the archive's files that make up each split.
      names: the file of class names of each label, in the order of the labels' bytes.
    """

    def read(paths: dict[str, Path], info) -> dict[str, Examples]:
        (path,) = paths.values()
        with tarfile.open(path) as archive:
            files = {
                Path(m.name).name: archive.extractfile(m).read() for m in archive if m.isfile()
            }
        for label, file in names.items():
            info.features[label].names = files[file].decode().split()

        def examples(split: str) -> Examples:
            data = np.frombuffer(b"".join(files[f] for f in members[split]), np.uint8)
            for i, record in enumerate(data.reshape(-1, len(names) + 3 * 32 * 32)):
                labels = dict(zip(names, record.tolist(), strict=False))
                picture = record[len(names) :].reshape(3, 32, 32).transpose(1, 2, 0)
                yield i, {"id": f"{split}_{i:05d}", "image": _picture(picture), **labels}

        return {split: examples(split) for split in members}

    return read


def _imagenet(tars: Path) -> dict[str, Examples]:
    """The examples of the two archives of ILSVRC 2012, as they are downloaded from image-net.org.

    The pictures are stored as they are, the one PNG and the few CMYK ones among them too.
    """
    import tensorflow_datasets as tfds

    # TFDS has the classes of the validation pictures, which their archive has not.
    labels = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt")
    classes = labels.read_text().split()

    def pictures(archive: tarfile.TarFile) -> Iterator[tuple[str, io.BytesIO]]:
        for member in archive:
            if member.isfile():
                yield Path(member.name).name, io.BytesIO(archive.extractfile(member).read())

    def example(name: str, picture: io.BytesIO, label: str) -> tuple[str, dict]:
        return name, {"file_name": name, "image": picture, "label": label}

    def train() -> Examples:
        with tarfile.open(tars / IMAGENET_TRAIN) as archive:
            for synset, inner in pictures(archive):
                with tarfile.open(fileobj=inner) as folder:
                    for name, picture in pictures(folder):
                        yield example(name, picture, Path(synset).stem)

    def validation() -> Examples:
        with tarfile.open(tars / IMAGENET_VALIDATION) as archive:
            for name, picture in pictures(archive):
                number = int(Path(name).stem.rsplit("_", 1)[1])
                yield example(name, picture, classes[number - 1])

    return {"train": train(), "validation": validation()}


def _picture(pixels: np.ndarray):
    from PIL import Image

    return Image.fromarray(np.ascontiguousarray(pixels))


ARCHIVES = {
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


@dataclass(frozen=True)
class Options:
    """Downloads, prepares and decodes a data set, so that training on it starts at once."""

    dataset: Annotated[Positional[str], tyro.conf.arg(metavar="|".join(PREPARED))]
    """The data set."""
    data_dir: Annotated[
        str | None,
        tyro.conf.arg(
            metavar="DIR",
            help_behavior_hint="(default: $TFDS_DATA_DIR, else ~/tensorflow_datasets)",
        ),
    ] = None
    """Where to."""
    tars: Annotated[
        Path | None, FOLDER, tyro.conf.arg(metavar="DIR", help_behavior_hint="(for imagenet)")
    ] = None
    """Where ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar are."""


def main(options: Options) -> None:
    """Prepares, and says where.

    Raises:
      DataError: if it cannot be done.
    """
    from input_pipeline import sources

    if options.dataset not in PREPARED:
        raise DataError(f"{options.dataset}: unknown; choose from {', '.join(PREPARED)}")
    folder = sources.data_path(options.data_dir)
    if options.dataset == "imagenet":
        prepare_imagenet(options.tars, folder)
    else:
        sources.load(SPECS[options.dataset], options.data_dir)
    print(f"{options.dataset} is prepared in {folder}")


if __name__ == "__main__":
    options = parse(Options, "./run prepare")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("input_pipeline").setLevel(logging.INFO)
    try:
        main(options)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
