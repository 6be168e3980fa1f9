"""What a run is told: one frozen dataclass, whose fields are the flags of ``train.py``."""

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro
from etils import epath

from input_pipeline import cloud
from input_pipeline.command_line import FOLDER
from input_pipeline.specs import SPECS, DatasetSpec
from models import ALIASES, ARCHITECTURES
from training.errors import ConfigError

ARCHS = tuple(ARCHITECTURES)
LOSSES = ("mse", "xent")
NORMS = ("frobenius", "spectral")
PLATFORMS = ("cpu", "gpu", "tpu")
PRECISIONS = ("f32", "bf16", "f64")
MESH_AXES = ("data", "fsdp", "model")
DATASETS = tuple(SPECS)

# The loaders whose images are cropped and resized.
OF_ANY_SIZE = ("imagenet", "folder", "noise")

# The flags that some networks have.
OPTIONS = ("depth", "width", "bn_group")

# What a run that goes on must have in common with its checkpoint.
IDENTITY = (
    "arch",
    "dataset",
    "loss",
    "train_bs",
    "depth",
    "width",
    "bn_group",
    "norm",
    "gain",
    "average",
    "seed",
    "image_size",
    "mean",
    "std",
    "num_classes",
    "precision",
)

# What processes that train together may be told differently: who and where they are.
OWN = ("coordinator", "process_id", "workdir", "data_dir", "workers", "verbose")


def _flag(choices: tuple[str, ...] = (), default: str | None = None) -> Any:
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
    loss: Annotated[str | None, _flag(LOSSES, "mse; imagenet and image_folder: xent")] = None
    """Mean squared error or cross-entropy."""
    train_bs: int = 128
    """Examples in a training batch, over all devices together."""
    test_bs: int = 128
    """Examples in a test batch, over all devices together."""
    epochs: int = 60
    """Passes over the training set."""
    depth: Annotated[int | None, _flag(("INT",), "10")] = None
    """Number of layers of fcn."""
    width: Annotated[int | None, _flag(("INT",), "256")] = None
    """Width of the hidden layers of fcn."""
    bn_group: int = 0
    """Consecutive examples that BatchNorm takes together; 0 takes the whole training batch."""
    norm: Annotated[str, _flag(NORMS)] = "frobenius"
    """The norm of a step: the paper's, or the operator norm, with momentum."""
    gain: float = 1.0
    """Multiplies every update; 1 is AGD, 10 an experiment."""
    average: bool = False
    """Average the weights along the run, and test, export and load the averaged network."""
    seed: int = 0
    """Fixes starting weights, order and augmentation."""
    image_size: Annotated[int | None, _flag(("PIXELS",), "224")] = None
    """Side of the images of imagenet and image_folder as the network sees them."""
    mean: Annotated[tuple[float, float, float] | None, _flag(("R G B",), "imagenet's")] = None
    """Mean of image_folder's pixels, scaled to 0 to 1."""
    std: Annotated[tuple[float, float, float] | None, _flag(("R G B",), "imagenet's")] = None
    """Standard deviation of image_folder's pixels, likewise."""
    num_classes: Annotated[int | None, tyro.conf.Suppress] = None
    """Classes of image_folder, which are found in the data."""
    workers: Annotated[int | None, _flag(("INT",), "one for each core but one")] = None
    """Processes that decode training images of imagenet, or of an image_folder too large to be held
    on the device, and as many that wait to decode test images; 0 decodes in threads."""
    data_dir: Annotated[
        str | None, _flag(("DIR",), "$TFDS_DATA_DIR, else ~/tensorflow_datasets")
    ] = None
    """Where TensorFlow Datasets keeps its data; for imagenet also, and for image_folder always, a
    folder with train and val. Either may be in a bucket, gs://bucket/folder."""
    workdir: Annotated[
        epath.Path | None, FOLDER, _flag(("DIR",), "runs/<dataset>-<arch>-<time>")
    ] = None
    """Where the run leaves its files; may be in a bucket, gs://bucket/folder."""
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
    save_every: Annotated[str, _flag(("INTmin|INTsteps",))] = "10min"
    """How often to save; the best epoch and the end are saved besides."""
    keep: int = 3
    """How many of the newest checkpoints to keep, beside the best epoch's."""
    restart: bool = False
    """Begin afresh in a workdir that holds a run, and set that run aside in it, each time."""
    verbose: bool = False
    """Log what several processes do together, to see which of them waits for which."""
    eval_only: bool = False
    """Test the best and the last checkpoint of --workdir, and train nothing."""

    def resolved(self) -> "TrainConfig":
        """Returns the config with defaults that depend on other fields filled in, and checked.

        Raises:
          ConfigError: for the first field that is wrong.
        """
        _choose("--arch", self.arch, ARCHS)
        _choose("--dataset", self.dataset, DATASETS)
        spec = SPECS[self.dataset]
        config = dataclasses.replace(
            self._placed(), loss=spec.loss if self.loss is None else self.loss
        )
        if spec.loader in OF_ANY_SIZE and self.image_size is None:
            config = dataclasses.replace(config, image_size=spec.image_shape[0])
        defaults = ARCHITECTURES[self.arch].options
        for name in OPTIONS:
            if name not in defaults and getattr(self, name) != getattr(TrainConfig, name):
                fitting = ", ".join(arch for arch in ARCHS if name in ARCHITECTURES[arch].options)
                raise ConfigError(
                    f"--{name} {getattr(self, name)}: is for {fitting}, not for {self.arch}"
                )
        unset: Any = {name: size for name, size in defaults.items() if getattr(self, name) is None}
        config = dataclasses.replace(config, **unset)
        _choose("--loss", config.loss, LOSSES)
        _choose("--norm", self.norm, NORMS)
        _choose("--precision", self.precision, PRECISIONS)
        _ = self.save_interval
        for name in ("train_bs", "test_bs", "epochs", "depth", "width", "image_size", "keep"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"--{name} {getattr(self, name)}: must be at least 1")
        if self.bn_group < 0 or (self.bn_group and self.train_bs % self.bn_group):
            raise ConfigError(
                f"--bn_group {self.bn_group}: does not divide --train_bs {self.train_bs}; 0 is for "
                "the whole batch"
            )
        if self.workers is not None and self.workers < 0:
            raise ConfigError(f"--workers {self.workers}: must be at least 0")
        for name, loaders in (
            ("image_size", OF_ANY_SIZE),
            ("workers", ("imagenet", "folder")),
            ("mean", ("folder",)),
            ("std", ("folder",)),
        ):
            if getattr(self, name) is not None and SPECS[self.dataset].loader not in loaders:
                fitting = ", ".join(n for n, spec in SPECS.items() if spec.loader in loaders)
                raise ConfigError(
                    f"--{name} {getattr(self, name)}: is for {fitting}, not for {self.dataset}"
                )
        if not all(map(math.isfinite, self.mean or ())):
            raise ConfigError(f"--mean {self.mean}: must be finite")
        if not all(0 < x < math.inf for x in self.std or ()):
            raise ConfigError(f"--std {self.std}: must be positive and finite")
        if self.data_dir is not None and not SPECS[self.dataset].stored:
            raise ConfigError(f"--data_dir {self.data_dir}: {self.dataset} is read from no folder")
        if self.data_dir is None and SPECS[self.dataset].loader == "folder":
            raise ConfigError(f"--dataset {self.dataset}: give its folder as --data_dir")
        if not 0 < self.gain < math.inf:
            raise ConfigError(f"--gain {self.gain}: must be positive and finite; AGD has 1")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"--seed {self.seed}: must be at least 0 and less than 2**32")
        if self.restart and self.workdir is None:
            raise ConfigError("--restart: give the --workdir of the run that is to begin afresh")
        return config

    def _placed(self) -> "TrainConfig":
        """The config with the flags checked that say where, and the network by its first name."""
        if self.workdir is not None and (reason := cloud.obstacle(self.workdir)):
            raise ConfigError(f"--workdir {self.workdir}: {reason}")
        if self.platform is not None:
            _choose("--platform", self.platform, PLATFORMS)
        _ = self.mesh_axes  # Checked here, and matched with the devices when they are known.
        given = (self.coordinator, self.num_processes, self.process_id)
        if any(x is not None for x in given) and None in given:
            raise ConfigError(
                "--coordinator, --num_processes and --process_id: give all three of them, or none"
            )
        address = re.fullmatch(r"\S+:(\d{1,5})", self.coordinator or "")
        if self.coordinator is not None and not (address and 0 < int(address[1]) < 2**16):
            raise ConfigError(
                f"--coordinator {self.coordinator}: give a host and a port, as in 10.0.0.1:1234"
            )
        number, count = self.process_id, self.num_processes
        if number is not None and count is not None and not 0 <= number < count:
            raise ConfigError(
                f"--process_id {self.process_id}: must be at least 0 and less than --num_processes "
                f"{self.num_processes}"
            )
        return dataclasses.replace(
            self,
            arch=ALIASES.get(self.arch, self.arch),
            distribute=self.distribute or self.coordinator is not None,
        )

    def to_evaluate(self) -> "TrainConfig":
        """Returns the config of ``--eval_only``, as far as it can be checked without its workdir.

        Raises:
          ConfigError: for the first field that is wrong.
        """
        if self.workdir is None:
            raise ConfigError("--eval_only: give the --workdir of the run that is meant")
        if self.restart:
            raise ConfigError(
                "--restart: would leave --eval_only nothing to test; give one of them"
            )
        return self._placed()

    @property
    def spec(self) -> DatasetSpec:
        """The data set, with what the config and the data say of it."""
        spec = SPECS[self.dataset]
        height, width, channels = spec.image_shape
        return dataclasses.replace(
            spec,
            image_shape=(self.image_size or height, self.image_size or width, channels),
            num_classes=self.num_classes or spec.num_classes,
            mean=self.mean or spec.mean,
            std=self.std or spec.std,
        )

    def for_classes(self, classes: Sequence[str]) -> "TrainConfig":
        """Returns the config with the number of classes, if only the data tell."""
        if SPECS[self.dataset].num_classes:
            return self
        return dataclasses.replace(self, num_classes=len(classes))

    @property
    def mesh_axes(self) -> dict[str, int] | None:
        """The sizes of the axes that ``--mesh`` names, in their order in :data:`MESH_AXES`.

        Raises:
          ConfigError: if it cannot be understood.
        """
        if self.mesh is None:
            return None
        axis = rf"(?:{'|'.join(MESH_AXES)})=[1-9]\d*"
        sizes = {name: int(size) for name, size in re.findall(r"(\w+)=(\d+)", self.mesh)}
        axes = 1 + self.mesh.count(",")
        if not re.fullmatch(rf"{axis}(,{axis})*", self.mesh) or len(sizes) < axes:
            raise ConfigError(
                f"--mesh {self.mesh}: give sizes for some of {', '.join(MESH_AXES)}, each once, "
                "as in data=4,model=2"
            )
        return {name: sizes[name] for name in MESH_AXES if name in sizes}

    @property
    def save_interval(self) -> tuple[float, int | None]:
        """The seconds and the steps between checkpoints, of which one is no limit.

        Raises:
          ConfigError: if ``--save_every`` cannot be understood.
        """
        found = re.fullmatch(r"([1-9]\d*)(min|steps)", self.save_every)
        if not found:
            raise ConfigError(
                f"--save_every {self.save_every}: give minutes or steps, as in 10min or 500steps"
            )
        number = int(found[1])
        return (60 * number, None) if found[2] == "min" else (math.inf, number)

    def check_same_run(self, saved: "TrainConfig", names: Iterable[str] = IDENTITY) -> None:
        """Raises ConfigError if a checkpoint is of another run, in one of the fields named.

        Args:
          saved: the config of the checkpoint; both are resolved.
          names: of the fields.
        """
        for name in names:
            ours, theirs = getattr(self, name), getattr(saved, name)
            if ours != theirs:
                has = f"without --{name}" if theirs is None else f"with {_given(name, theirs)}"
                raise ConfigError(
                    f"{_given(name, ours)}: {self.workdir} holds a run {has}; give "
                    + ("that" if self.eval_only else "that, another --workdir, or --restart")
                )

    def to_json(self) -> dict[str, Any]:
        """The fields as what JSON has: numbers, strings and null."""
        fields = dataclasses.asdict(self)
        return {k: os.fspath(v) if isinstance(v, os.PathLike) else v for k, v in fields.items()}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "TrainConfig":
        """The inverse of :meth:`to_json`; fields that are left out have their defaults.

        Raises:
          TypeError: if a field is unknown.
        """
        # JSON has neither tuples nor paths.
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        if fields.get("workdir") is not None:
            fields["workdir"] = epath.Path(fields["workdir"])
        return cls(**fields)


def _given(name: str, value: object) -> str:
    """Returns a flag as a user gives it."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no_{name}"
    return f"--{name} {value}"


def _choose(flag: str, given: str | None, choices: tuple[str, ...]) -> None:
    if given not in choices:
        raise ConfigError(f"{flag} {given}: unknown; choose from {', '.join(choices)}")
