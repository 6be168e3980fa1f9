"""Checkpoints: all that a run needs to resume as if it had never stopped, written by Orbax.

``workdir/checkpoints`` has a folder for each checkpoint, named by its step, with three items:
``model`` (parameters and running averages), ``training`` (step, optimiser state, metrics of the
current epoch) and ``run`` (JSON: config, records of the epochs so far, position in the data). A run
with ``--average`` has a fourth, ``averaged``: the averaged network as it was last evaluated, with
BatchNorm's statistics of its own, in the form of ``model``.
Nothing in it is pickled, and reading it executes nothing.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import inspect
import json
import logging
import re
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import jax
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx

from input_pipeline import cloud
from input_pipeline.patience import patiently
from training.config import TrainConfig
from training.errors import ConfigError
from training.records import EpochRecord, best_step
from training.state import Model, abstract_network
from training.workdir import CHECKPOINTS, located

log = logging.getLogger(__name__)

# Waits before a checkpoint that the system could not read is read again.
RETRY_SECONDS = (1, 5)

# How the message begins if a remote store could not be read, whatever it holds.
UNAVAILABLE = (
    "DEADLINE_EXCEEDED",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "UNAUTHENTICATED",
    "UNAVAILABLE",
)

# The packages whose errors say that a bucket could not be read.
BUCKET_CLIENTS = ("aiohttp", "fsspec", "gcsfs", "google")

T = TypeVar("T")
Which = Literal["best", "last"]


@dataclass(frozen=True)
class RunItem:
    """The item ``run`` of a checkpoint.

    Attributes:
      config: the config of the run, as JSON values.
      records: the records of the epochs so far.
      seconds: how long the current epoch has been trained, in seconds.
      position: the position in the training data, as JSON values.
      sizes: the sizes of the training and the test set.
      classes: the names of the classes, in the order of the labels.
    """

    config: dict[str, Any]
    records: list[EpochRecord]
    seconds: float
    position: dict[str, Any]
    sizes: list[int]
    classes: list[str]

    def to_json(self) -> dict[str, Any]:
        """Returns the fields by name, as JSON values."""
        return vars(self) | {"records": [record.to_json() for record in self.records]}

    def fingerprint(self) -> int:
        """Returns a number that the same checkpoint of another run would not have."""
        return zlib.crc32(json.dumps(self.to_json()).encode())

    def resolved_config(self) -> TrainConfig:
        """Returns the resolved config of the run.

        Raises:
          ConfigError: if the saved config is not valid.
        """
        try:
            return TrainConfig.from_json(self.config).resolved()
        except (AttributeError, TypeError, ValueError) as error:
            raise ConfigError(f"the saved config cannot be understood ({error})") from error


def saved_classes(workdir: epath.Path) -> list[str]:
    """Returns the classes of the newest checkpoint whose item ``run`` can be read, or none."""
    with contextlib.suppress(ConfigError), reading(folder_of(workdir)) as reader:
        for step in reversed(reader.all_steps()):
            # Whoever goes on from it says that it cannot be read.
            with contextlib.suppress(Exception):
                return read_items(reader, step, {}).run.classes
    return []


class Saved(NamedTuple):
    """What was read of a checkpoint.

    Attributes:
      step: the step after which it was saved.
      run: the item ``run`` of the checkpoint.
      items: the other items, by name.
    """

    step: int
    run: RunItem
    items: dict[str, Any]


def read_last(workdir: epath.Path, target: dict[str, Model]) -> Saved:
    """Reads the item ``run`` and networks of the newest checkpoint that can be read.

    Args:
      workdir: the folder of the run.
      target: the shapes of the networks, with shardings, by the names of their items.

    Raises:
      ConfigError: if there is none.
    """
    with reading(folder_of(workdir)) as reader:
        found, damaged = newest_readable(reader, lambda step: read_items(reader, step, target))
    if found is None:
        problem = "none of its checkpoints can be read" if damaged else "holds no checkpoint"
        raise ConfigError(f"{workdir}: {problem}")
    return found


def read_best(workdir: epath.Path, target: dict[str, Model], last: Saved) -> Saved:
    """Reads networks of the epoch with the best test accuracy.

    Args:
      workdir: the folder of the run.
      target: the shapes of the networks, with shardings, by the names of their items.
      last: the result of :func:`read_last`, which may be the best one too.

    Raises:
      ConfigError: if it cannot be read.
    """
    with reading(folder_of(workdir)) as reader:
        step = best_step(last.run.records, {*reader.all_steps()})
        if step in (last.step, None):
            return last
        try:
            return read_items(reader, step, target)
        except Exception as error:
            path = folder_of(workdir) / str(step)
            raise ConfigError(f"{path}: cannot be read ({one_line(error)})") from error


def load(
    workdir: epath.PathLike, which: Which = "best", plain: bool = False
) -> tuple[nnx.Module, TrainConfig]:
    """Loads a trained network.

    >>> model, config = load("runs/cifar10-resnet18")  # doctest: +SKIP
    >>> logits = model(images)  # doctest: +SKIP

    Args:
      workdir: the folder of the run.
      which: "best" for the checkpoint of the epoch with the best test accuracy, or "last".
      plain: whether to load the network with its own weights, of a run with ``--average`` too;
        otherwise it is the averaged one then, as it was last evaluated.

    Returns:
      The network and the config of the run. The network maps images
      ``(batch, *config.spec.image_shape)``, normalised by :func:`input_pipeline.batch.normalise`,
      to logits ``(batch, config.spec.num_classes)``. Its BatchNorm uses the running averages.

    Raises:
      ConfigError: if there is no such checkpoint, or it cannot be read.
      ValueError: if ``which`` is neither "best" nor "last".
    """
    trained = load_all(workdir, which, plain)
    return trained.model, trained.config


class Trained(NamedTuple):
    """A trained network, and what is needed to use it.

    Attributes:
      model: the network, as :func:`load` returns it.
      config: the config of the run.
      step: the step after which it was saved.
      classes: the names of the classes, in the order of the logits; empty for noise.
    """

    model: nnx.Module
    config: TrainConfig
    step: int
    classes: list[str]


def load_all(workdir: epath.PathLike, which: Which = "best", plain: bool = False) -> Trained:
    """Loads a trained network as :func:`load` does, with its step and the names of the classes."""
    if which not in get_args(Which):
        raise ValueError(f"which={which!r}: choose from {', '.join(get_args(Which))}")
    workdir = located(workdir)
    config = read_last(workdir, {}).run.resolved_config()
    with jax.enable_x64(config.precision == "f64"):
        graphdef, params, batch_stats = abstract_network(config)
        item = "averaged" if config.average and not plain else "model"
        target = on_one_device({item: {"params": params, "batch_stats": batch_stats}})
        saved = read_last(workdir, target)
        if which == "best":
            saved = read_best(workdir, target, saved)
    arrays = saved.items[item]
    model = nnx.merge(graphdef, arrays["params"], arrays["batch_stats"])
    model.eval()
    return Trained(model, config, saved.step, saved.run.classes)


def folder_of(workdir: epath.Path) -> epath.Path:
    """Returns the absolute path of the folder in which a run has its checkpoints."""
    folder = workdir / CHECKPOINTS
    # TensorStore does not accept relative paths.
    return epath.Path(cloud.absolute(folder))


@contextlib.contextmanager
def reading(folder: epath.Path) -> Iterator[ocp.CheckpointManager]:
    """Opens a checkpoint manager that only reads, and does not wait for other processes.

    Raises:
      ConfigError: if the folder cannot be read.
    """
    _pass_over_abandoned_reads()
    this = jax.process_index()
    options = ocp.CheckpointManagerOptions(
        create=False,
        # Otherwise one damaged checkpoint keeps the manager from opening.
        lightweight_initialize=True,
        multiprocessing_options=ocp.options.MultiprocessingOptions(
            primary_host=this, active_processes={this}, barrier_sync_key_prefix=f"reader_{this}"
        ),
    )
    try:
        with cloud.failing_as_files_do(folder):
            manager = ocp.CheckpointManager(folder, options=options)
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}") from error
    with manager:
        yield manager


@functools.cache
def _pass_over_abandoned_reads() -> None:
    """Says nothing from now on of reads that end after the first to fail has ended them all.

    TensorStore finds the event loop of Orbax closed, and Python finds coroutines that nobody waits
    for; both would print pages.
    """
    before = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if str(unraisable.exc_value) != "Event loop is closed" and not inspect.iscoroutine(
            unraisable.object
        ):
            before(unraisable)

    warnings.filterwarnings("ignore", r"coroutine '\w+\._get_array_metadatas' was never awaited")

    sys.unraisablehook = hook


def read_items(reader: ocp.CheckpointManager, step: int, target: dict[str, Any]) -> Saved:
    """Reads the item ``run`` of a checkpoint, and the other items whose shapes are given.

    For damaged files, Orbax and TensorStore raise many errors.
    """
    arrays = {name: ocp.args.StandardRestore(tree) for name, tree in target.items()}
    saved = reader.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore(), **arrays))
    records = [EpochRecord(**record) for record in saved["run"]["records"]]
    run = RunItem(**saved["run"] | {"records": records})
    return Saved(step, run, {name: saved[name] for name in target})


def newest_readable(
    reader: ocp.CheckpointManager, read: Callable[[int], T]
) -> tuple[T | None, list[int]]:
    """Reads the newest checkpoint that can be read, and lists the newer ones that cannot.

    Returns:
      The result of reading it, if there is one; and the steps of the damaged ones.
    """
    by_system = lambda error: not _is_damage(error)
    damaged: list[int] = []
    for step in reversed(reader.all_steps()):
        try:
            return patiently(functools.partial(read, step), RETRY_SECONDS, by_system), damaged
        except ConfigError:
            raise
        except Exception as error:  # Orbax and TensorStore raise many for damaged files.
            path = reader.directory / str(step)
            if not _is_damage(error):
                # The checkpoint may be intact, and older ones would fail in the same way.
                raise ConfigError(f"{path}: {one_line(error)}") from error
            log.warning("%s: cannot be read (%s)", path, one_line(error))
            damaged.append(step)
    return None, damaged


def _is_damage(error: BaseException) -> bool:
    """Returns whether a file is damaged or missing, and not a system unable to read it."""
    cause = error.__cause__ or error
    # TensorStore says so in the text of a ValueError.
    said = re.search(r"os_error_code='(\d+)'", str(cause))
    number = int(said[1]) if said else getattr(cause, "errno", None)
    system = number not in (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
    # What reads a bucket for Orbax has errors of its own, without a number.
    system |= type(cause).__module__.partition(".")[0] in BUCKET_CLIENTS
    return not (system or isinstance(cause, MemoryError) or str(cause).startswith(UNAVAILABLE))


def on_one_device(tree: Any) -> Any:
    """Returns the shapes of a tree, each array whole on the first device of this process."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree)


def one_line(error: BaseException) -> str:
    """Shortens an error message to the end of its first line, where long lines get specific."""
    # Orbax wraps the error of TensorStore, which appends its request, as a page of JSON.
    error = error.__cause__ or error
    line = (str(error).splitlines() or [type(error).__name__])[0]
    for details in (" [os_error_code", " [tensorstore_spec", " [source locations"):
        line = line.partition(details)[0]
    return line if len(line) <= 160 else f"... {line[-160:]}"
