"""Finding the data set of a run, the same in every process."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from input_pipeline import resident
from input_pipeline.resident import Arrays
from training import multihost
from training.config import TrainConfig

if TYPE_CHECKING:
    from input_pipeline.streaming import Sources


def load_data(config: TrainConfig, known: Sequence[str] = ()) -> "Arrays | Sources":
    """Loads a small data set, or finds a large one; the same in every process.

    Args:
      config: the config of the run.
      known: the classes that the network was trained on, in the order of its labels, if it was.

    Raises:
      ConfigError: if a process has other data than process 0, or none.
      DataError: if the data set cannot be had.
    """
    data = multihost.in_every(lambda: _load(config, known))
    splits = {"training": data.train, "test": data.test}
    multihost.check_same(
        lambda: (
            {f"{name} images": split.size for name, split in splits.items()}
            | {f"fingerprint of the {name} images": s.fingerprint() for name, s in splits.items()}
        )
    )
    return data


def _load(config: TrainConfig, known: Sequence[str]) -> "Arrays | Sources":
    spec = config.spec
    if spec.loader in ("digits", "tfds"):
        data = resident.load(spec, config.data_dir)
        return data.labelled_by(known, f"--dataset {config.dataset}")
    from input_pipeline import folders, imagenet, streaming

    if spec.loader == "noise":
        return streaming.noise_sources(config.train_bs, config.test_bs)
    if spec.loader == "imagenet":
        return imagenet.find(spec, config.data_dir, known)
    assert config.data_dir is not None  # As resolved() has checked.
    found = folders.find(config.data_dir, known)
    return folders.decoded(spec, found) if folders.fits(spec, found) else found
