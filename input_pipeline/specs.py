"""The properties of each data set, in one place."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DatasetSpec:
    """One data set.

    Attributes:
      name: its name for ``--dataset``.
      image_shape: ``(height, width, channels)`` of an image as the network sees it.
      num_classes: the number of classes, 0 if only the data tell. Labels are
        ``0 .. num_classes - 1``.
      mean: the mean of each channel, for pixels scaled to ``[0, 1]``.
      std: the standard deviation of each channel, likewise.
      augment: whether training images are padded by 4, cropped at random and flipped.
      tfds_name: its name in TensorFlow Datasets, empty if it is not there.
      loss: the default of ``--loss``.
      loader: the source of its data: ``digits``, scikit-learn; ``tfds``, a prepared folder of
        TensorFlow Datasets, decoded whole; ``imagenet``, records that are streamed; ``folder``,
        image files, decoded whole if they are few and streamed if they are many; ``noise``, none.
    """

    name: str
    image_shape: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: bool = False
    tfds_name: str = ""
    loss: Literal["mse", "xent"] = "mse"
    loader: Literal["digits", "tfds", "imagenet", "folder", "noise"] = "tfds"

    @property
    def stored(self) -> bool:
        """Whether it is read from a folder that a user may choose."""
        return self.loader in ("tfds", "imagenet", "folder")


SPECS = {
    spec.name: spec
    for spec in (
        DatasetSpec("digits", (8, 8, 1), 10, (0.3054,), (0.3757,), loader="digits"),
        DatasetSpec("mnist", (28, 28, 1), 10, (0.1307,), (0.3081,), tfds_name="mnist"),
        DatasetSpec(
            "cifar10",
            (32, 32, 3),
            10,
            (0.4914, 0.4822, 0.4465),
            (0.2023, 0.1994, 0.2010),
            augment=True,
            tfds_name="cifar10",
        ),
        DatasetSpec(
            "cifar100",
            (32, 32, 3),
            100,
            (0.5071, 0.4867, 0.4408),
            (0.2675, 0.2565, 0.2761),
            augment=True,
            tfds_name="cifar100",
        ),
        DatasetSpec(
            "imagenet",
            (224, 224, 3),
            1000,
            (0.485, 0.456, 0.406),
            (0.229, 0.224, 0.225),
            augment=True,
            tfds_name="imagenet2012",
            loss="xent",
            loader="imagenet",
        ),
        DatasetSpec(
            "image_folder",
            (224, 224, 3),
            0,
            (0.485, 0.456, 0.406),
            (0.229, 0.224, 0.225),
            augment=True,
            loss="xent",
            loader="folder",
        ),
        DatasetSpec(
            "synthetic_imagenet",
            (224, 224, 3),
            1000,
            (0.485, 0.456, 0.406),
            (0.229, 0.224, 0.225),
            loss="xent",
            loader="noise",
        ),
    )
}
