"""What a run is told: one frozen dataclass, whose fields are the flags of ``train.py``."""

import dataclasses
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from input_pipeline.specs import SPECS, DatasetSpec
from models import ARCHITECTURES

ARCHS = tuple(ARCHITECTURES)
LOSSES = ("mse", "xent")
PLATFORMS = ("cpu", "gpu", "tpu")
PRECISIONS = ("f32", "bf16", "f64")
MESH_AXES = ("data", "fsdp", "model")
DATASETS = tuple(SPECS)


class ConfigError(Exception):
    """A flag cannot be followed; the message names it, what was given and what would work."""


def _flag(choices: tuple[str, ...] = (), default: str | None = None):
    """How ``--help`` shows a field: what it may be, and what it is when it is left out."""
    return tyro.conf.arg(
        metavar="|".join(choices) or None,
        help_behavior_hint=f"(default: {default})" if default else None,
    )


@dataclass(frozen=True)
class TrainConfig:
    """Trains a network with automatic gradient descent: no learning rate, nothing to tune."""

    arch: Annotated[str, _flag(ARCHS)] = "fcn"
    """The network."""
    dataset: Annotated[str, _flag(DATASETS)] = "digits"
    """The data set."""
    loss: Annotated[str | None, _flag(LOSSES, "mse, on imagenet xent")] = None
    """Mean squared error or cross-entropy."""
    train_bs: int = 128
    """Examples in a training batch, over all devices together."""
    test_bs: int = 128
    """Examples in a test batch, over all devices together."""
    epochs: int = 60
    """Passes over the training set."""
    depth: int = 10
    """Number of layers of fcn."""
    width: int = 256
    """Width of the hidden layers of fcn."""
    gain: float = 1.0
    """Multiplies every update; 1 is AGD, 10 an experiment."""
    seed: int = 0
    """Fixes starting weights, order and augmentation."""
    image_size: Annotated[int | None, _flag(("PIXELS",), "224")] = None
    """Side of imagenet's pictures as the network sees them."""
    workers: Annotated[int | None, _flag(("INT",), "one for each core but one")] = None
    """Processes that decode imagenet's training pictures, and as many that wait to decode its
    test pictures; 0 decodes in threads."""
    data_dir: Annotated[
        str | None, _flag(("DIR",), "$TFDS_DATA_DIR, else ~/tensorflow_datasets")
    ] = None
    """Where TensorFlow Datasets keeps its data; for imagenet also a folder with train and val."""
    workdir: Annotated[Path | None, _flag(("DIR",), "runs/<dataset>-<arch>-<time>")] = None
    """Where the run leaves its files."""
    platform: Annotated[str | None, _flag(PLATFORMS, "the best that JAX finds")] = None
    """Where to compute."""
    mesh: Annotated[str | None, _flag(("data=N,fsdp=N,model=N",), "all devices on data")] = None
    """Shares batches over data and fsdp, parameters over fsdp, dense layers over model."""
    distribute: bool = False
    """One of several processes; SLURM, Open MPI, TPU pods and GKE tell which by themselves."""
    coordinator: Annotated[str | None, _flag(("HOST:PORT",), "found by --distribute")] = None
    """Where the processes meet: an address of process 0."""
    num_processes: Annotated[int | None, _flag(("INT",), "found by --distribute")] = None
    """How many there are."""
    process_id: Annotated[int | None, _flag(("INT",), "found by --distribute")] = None
    """Which this is, the first being 0."""
    precision: Annotated[str, _flag(PRECISIONS)] = "f32"
    """Arithmetic of the network; bf16 keeps parameters, loss and optimiser in f32."""

    def resolved(self) -> "TrainConfig":
        """Returns the config with defaults that depend on other fields filled in, and checked.

        Raises:
          ConfigError: for the first field that is wrong.
        """
        _choose("--arch", self.arch, ARCHS)
        _choose("--dataset", self.dataset, DATASETS)
        config = dataclasses.replace(
            self,
            loss=self.loss or SPECS[self.dataset].loss,
            distribute=self.distribute or self.coordinator is not None,
        )
        _choose("--loss", config.loss, LOSSES)
        _choose("--precision", self.precision, PRECISIONS)
        if self.platform is not None:
            _choose("--platform", self.platform, PLATFORMS)
        _ = self.mesh_axes  # Checked here, and matched with the devices when they are known.
        for name in ("train_bs", "test_bs", "epochs", "depth", "width", "image_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"--{name} {getattr(self, name)}: must be at least 1")
        if self.workers is not None and self.workers < 0:
            raise ConfigError(f"--workers {self.workers}: must be at least 0")
        for name in ("image_size", "workers"):
            if getattr(self, name) is not None and not SPECS[self.dataset].streamed:
                streamed = " and ".join(name for name, spec in SPECS.items() if spec.streamed)
                raise ConfigError(
                    f"--{name} {getattr(self, name)}: is for {streamed}, not for {self.dataset}"
                )
        given = (self.coordinator, self.num_processes, self.process_id)
        if any(x is not None for x in given) and None in given:
            raise ConfigError(
                "--coordinator, --num_processes and --process_id: give all three of them, or none"
            )
        if self.num_processes is not None and not 0 <= self.process_id < self.num_processes:
            raise ConfigError(
                f"--process_id {self.process_id}: must be at least 0 and less than --num_processes "
                f"{self.num_processes}"
            )
        if not 0 < self.gain < math.inf:
            raise ConfigError(f"--gain {self.gain}: must be positive and finite; AGD has 1")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"--seed {self.seed}: must be at least 0 and less than 2**32")
        return config

    @property
    def spec(self) -> DatasetSpec:
        """The data set, with its pictures in the size that the network is to see."""
        spec = SPECS[self.dataset]
        if self.image_size is None:
            return spec
        shape = (self.image_size, self.image_size, spec.image_shape[2])
        return dataclasses.replace(spec, image_shape=shape)

    @property
    def mesh_axes(self) -> dict[str, int] | None:
        """The sizes of the axes that ``--mesh`` names, in their order in :data:`MESH_AXES`.

        Raises:
          ConfigError: if it cannot be understood.
        """
        if self.mesh is None:
            return None
        found = re.findall(r"(?:^|,)(\w+)=([1-9]\d*)(?=,|$)", self.mesh)
        sizes = {name: int(size) for name, size in found}
        understood = ",".join(f"{name}={size}" for name, size in found) == self.mesh
        if (
            not sizes
            or not understood
            or len(sizes) < len(found)
            or not set(sizes) <= set(MESH_AXES)
        ):
            raise ConfigError(
                f"--mesh {self.mesh}: give sizes for some of {', '.join(MESH_AXES)}, each once, "
                "as in data=4,model=2"
            )
        return {name: sizes[name] for name in MESH_AXES if name in sizes}

    def to_json(self) -> dict:
        """The fields as what JSON has: numbers, strings and null."""
        fields = dataclasses.asdict(self)
        return {k: os.fspath(v) if isinstance(v, Path) else v for k, v in fields.items()}


def _choose(flag: str, given: str, choices: tuple[str, ...]) -> None:
    if given not in choices:
        raise ConfigError(f"{flag} {given}: unknown; choose from {', '.join(choices)}")
