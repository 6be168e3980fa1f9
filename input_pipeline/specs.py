"""What is known of each data set, in one place."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DatasetSpec:
    """One data set.

    Attributes:
      name: what ``--dataset`` calls it.
      image_shape: ``(height, width, channels)`` of a picture as the network sees it.
      num_classes: labels are ``0 .. num_classes - 1``.
      mean: of each channel, for pixels scaled to ``[0, 1]``.
      std: likewise.
      augment: whether training pictures are padded by 4, cropped at random and flipped.
      tfds_name: the name in TensorFlow Datasets; None for data that comes with a library.
      loss: the loss that ``--loss`` defaults to.
      streamed: too large to live on the device; pictures of any size, seen through random windows.
    """

    name: str
    image_shape: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: bool = False
    tfds_name: str | None = None
    loss: Literal["mse", "xent"] = "mse"
    streamed: bool = False

    @property
    def stored(self) -> bool:
        """Whether it is read from a folder that a user may choose."""
        return self.tfds_name is not None


SPECS = {
    spec.name: spec
    for spec in (
        DatasetSpec("digits", (8, 8, 1), 10, (0.3054,), (0.3757,)),
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
            streamed=True,
        ),
        DatasetSpec(
            "synthetic_imagenet",
            (224, 224, 3),
            1000,
            (0.485, 0.456, 0.406),
            (0.229, 0.224, 0.225),
            loss="xent",
            streamed=True,
        ),
    )
}
