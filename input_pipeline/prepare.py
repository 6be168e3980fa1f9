"""The program that prepares a data set, for clusters whose training nodes have no network.

``./run prepare cifar10 --data_dir DIR`` downloads and prepares CIFAR-10. ImageNet is prepared from
the two archives of image-net.org.
"""

import io
import logging
import os
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import tyro
from etils import epath
from tyro.conf import Positional

from input_pipeline import prepared
from input_pipeline.command_line import FOLDER, complain, parse, say
from input_pipeline.errors import DataError
from input_pipeline.specs import SPECS

log = logging.getLogger(__name__)

IMAGENET_TARS = IMAGENET_TRAIN, IMAGENET_VALIDATION = (
    "ILSVRC2012_img_train.tar",
    "ILSVRC2012_img_val.tar",
)
IMAGENET_SIZES = {"train": 1_281_167, "validation": 50_000}

# The data sets that can be prepared.
PREPARED = tuple(
    name
    for name, spec in SPECS.items()
    if spec.loader == "imagenet" or spec.tfds_name in prepared.ARCHIVES
)


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
        epath.Path | None, FOLDER, tyro.conf.arg(metavar="DIR", help_behavior_hint="(for imagenet)")
    ] = None
    """Where ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar are."""


def main(options: Options) -> None:
    """Prepares a data set, and prints where it is.

    Raises:
      DataError: if the data set cannot be prepared.
    """
    if options.dataset not in PREPARED:
        raise DataError(f"{options.dataset}: unknown; choose from {', '.join(PREPARED)}")
    if options.tars and options.dataset != "imagenet":
        raise DataError(f"--tars {options.tars}: is for imagenet, not for {options.dataset}")
    folder = prepared.data_path(options.data_dir)
    if options.dataset == "imagenet":
        prepare_imagenet(Path(options.tars) if options.tars else None, folder)
    else:
        from input_pipeline import resident

        resident.load(SPECS[options.dataset], options.data_dir)
    say(f"{options.dataset} is prepared in {folder}")


def prepare_imagenet(tars: Path | None, data_dir: epath.PathLike) -> None:
    """Prepares ImageNet from the two archives in ``tars``, unless it is prepared already.

    Raises:
      DataError: if an archive is missing or damaged, or the folder cannot be written.
    """
    spec = SPECS["imagenet"]
    if prepared.builder_of(spec, data_dir).is_prepared():
        return
    missing = [n for n in IMAGENET_TARS if tars is None or not os.path.isfile(tars / n)]
    if tars is None or missing:
        raise DataError(
            f"--tars {tars}: has no {' and no '.join(missing)}; download what is missing from "
            "image-net.org and give its folder"
        )
    builder = prepared.prepared_builder(spec, data_dir, _imagenet(tars))
    for split, expected in IMAGENET_SIZES.items():
        if (found := builder.info.splits[split].num_examples) != expected:
            log.warning(
                "%s has %s images, and not %s; was an archive cut off?", split, found, expected
            )


def _imagenet(tars: Path) -> dict[str, prepared.Examples]:
    """Returns the examples of the two ILSVRC 2012 archives, as downloaded from image-net.org.

    The images are stored unchanged, including the one PNG and the few CMYK images among them.
    """
    import tensorflow_datasets as tfds

    # The archive of validation images lacks their classes. TFDS has them.
    labels = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt")
    classes = labels.read_text().split()

    def files(file: BinaryIO, origin: str) -> Iterator[tuple[str, io.BytesIO]]:
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    name = Path(member.name).name
                    content = archive.extractfile(member)
                    # A Mac adds files that begin with `._`.
                    if content and not name.startswith("."):
                        yield name, io.BytesIO(content.read())
                # A header that is damaged ends the loop just as the zeros at the end do.
                file.seek(archive.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise DataError(f"{origin}: is cut off or damaged at byte {archive.offset:,}")
        except tarfile.TarError as error:
            raise DataError(f"{origin}: {error}") from error

    def example(name: str, data: io.BytesIO, label: str) -> tuple[str, dict[str, Any]]:
        return name, {"file_name": name, "image": data, "label": label}

    def train() -> prepared.Examples:
        path, seen = tars / IMAGENET_TRAIN, set()
        with open(path, "rb") as file:
            for synset, inner in files(file, os.fspath(path)):
                if synset in seen:
                    raise DataError(f"{path}: has {synset} twice")
                seen.add(synset)
                for name, data in files(inner, f"{path}: {synset}"):
                    yield example(name, data, Path(synset).stem)

    def validation() -> prepared.Examples:
        path = tars / IMAGENET_VALIDATION
        with open(path, "rb") as file:
            for name, data in files(file, os.fspath(path)):
                number = int(Path(name).stem.rsplit("_", 1)[1])
                yield example(name, data, classes[number - 1])

    return {"train": train(), "validation": validation()}


if __name__ == "__main__":
    options = parse(Options, "./run prepare")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("input_pipeline").setLevel(logging.INFO)
    try:
        main(options)
    except DataError as error:
        complain(f"error: {error}")
        sys.exit(2)
