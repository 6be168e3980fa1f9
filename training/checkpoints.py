"""Checkpoints: all that a run needs to go on as if it had never stopped, written by Orbax.

``workdir/checkpoints`` has a folder for each, named by its step, with three items: ``model``
(parameters and running averages), ``training`` (step, optimiser state, metrics of the epoch under
way) and ``run`` (JSON: config, records of the epochs so far, place in the data). Nothing in it is
pickled or executed when it is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, get_args

import jax
import orbax.checkpoint as ocp
from flax import nnx

from training import metrics, network
from training.config import ConfigError, TrainConfig
from training.metrics import TrainMetrics
from training.workdir import CHECKPOINTS

if TYPE_CHECKING:
    from training.state import TrainState

log = logging.getLogger(__name__)

# What the record of an epoch has at the least.
RECORD = ("epoch", "step", "test_loss", "test_accuracy")

T = TypeVar("T")
Which = Literal["best", "last"]


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A run between two steps.

    Attributes:
      step: number of steps taken.
      state: after them.
      sums: metrics of the epoch under way.
      seconds: for which that epoch has been trained.
      records: of the epochs before it, as in ``metrics.jsonl``.
      position: the place in the training data, as JSON has it.
    """

    step: int
    state: TrainState
    sums: TrainMetrics
    seconds: float
    records: list[dict]
    position: dict


def saved_config(workdir: Path) -> TrainConfig:
    """The config of the run that left its checkpoints in a folder.

    Raises:
      ConfigError: if there are none, or none can be read.
    """
    with reading(folder_of(workdir)) as reader:
        _, (run, _) = _last(workdir, reader, {})
    return config_of(run)


class Saved(NamedTuple):
    """What a checkpoint has of a network.

    Attributes:
      step: after which it was saved.
      run: its item ``run``.
      model: its parameters and running averages, as ``{"params": ..., "batch_stats": ...}``.
    """

    step: int
    run: dict
    model: dict


def read_last(workdir: Path, like: dict) -> Saved:
    """Reads the network of the newest checkpoint that can be read.

    Args:
      workdir: of a run.
      like: the shapes of the model, with shardings.

    Raises:
      ConfigError: if there is none.
    """
    with reading(folder_of(workdir)) as reader:
        step, (run, arrays) = _last(workdir, reader, {"model": like})
    return Saved(step, run, arrays["model"])


def read_best(workdir: Path, like: dict, last: Saved) -> Saved:
    """Reads the network of the epoch with the best test accuracy, likewise.

    Args:
      workdir: of a run.
      like: the shapes of the model, with shardings.
      last: from :func:`read_last`, which may be it.

    Raises:
      ConfigError: if it cannot be read.
    """
    with reading(folder_of(workdir)) as reader:
        step = best_step(last.run["records"], {*reader.all_steps()})
        if step in (last.step, None):
            return last
        try:
            run, arrays = read_items(reader, step, {"model": like})
        except Exception as error:
            path = folder_of(workdir) / str(step)
            raise ConfigError(f"{path}: cannot be read ({one_line(error)})") from error
    return Saved(step, run, arrays["model"])


def load(workdir: str | os.PathLike, which: Which = "best") -> tuple[nnx.Module, TrainConfig]:
    """Loads a trained network.

    >>> model, config = load("runs/cifar10-resnet18")  # doctest: +SKIP
    >>> logits = model(images)  # doctest: +SKIP

    Args:
      workdir: of a run.
      which: the checkpoint of the epoch with the best test accuracy, or the last one.

    Returns:
      The network, which maps pictures ``(batch, *config.spec.image_shape)``, normalised as
      :func:`input_pipeline.batch.normalise` does, to logits ``(batch, config.spec.num_classes)``
      and normalises by its running averages; and the config of the run.

    Raises:
      ConfigError: if there is no such checkpoint, or it cannot be read.
      ValueError: if ``which`` is neither.
    """
    trained = load_all(workdir, which)
    return trained.model, trained.config


class Trained(NamedTuple):
    """A trained network, and what there is to know to use it.

    Attributes:
      model: as :func:`load` returns it.
      config: of the run.
      step: after which it was saved.
      classes: their names, in the order of the logits; none for noise.
    """

    model: nnx.Module
    config: TrainConfig
    step: int
    classes: list[str]


def load_all(workdir: str | os.PathLike, which: Which = "best") -> Trained:
    """As :func:`load`, with the step and the names of the classes."""
    if which not in get_args(Which):
        raise ValueError(f"which={which!r}: choose from {', '.join(get_args(Which))}")
    workdir = Path(workdir).expanduser()
    config = saved_config(workdir)
    with jax.enable_x64(config.precision == "f64"):
        model = nnx.eval_shape(lambda: network.create(config))
        graphdef, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)
        like = on_one_device({"params": params, "batch_stats": batch_stats})
        saved = read_last(workdir, like)
        if which == "best":
            saved = read_best(workdir, like, saved)
    model = nnx.merge(graphdef, saved.model["params"], saved.model["batch_stats"])
    model.eval()
    return Trained(model, config, saved.step, saved.run["classes"])


def folder_of(workdir: Path) -> Path:
    """Where a run has its checkpoints."""
    # TensorStore takes no relative paths.
    return (workdir / CHECKPOINTS).absolute()


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[ocp.CheckpointManager]:
    """A manager that is only to read, and waits for no other process."""
    this = jax.process_index()
    options = ocp.CheckpointManagerOptions(
        create=False,
        # Else one damaged checkpoint keeps it from opening.
        lightweight_initialize=True,
        multiprocessing_options=ocp.options.MultiprocessingOptions(
            primary_host=this, active_processes={this}, barrier_sync_key_prefix=f"reader_{this}"
        ),
    )
    with ocp.CheckpointManager(folder, options=options) as manager:
        yield manager


def read_items(reader: ocp.CheckpointManager, step: int, like: dict) -> tuple[dict, dict]:
    """Reads the item ``run`` of a checkpoint, and those others that are given the shapes of."""
    arrays = {name: ocp.args.StandardRestore(tree) for name, tree in like.items()}
    saved = reader.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore(), **arrays))
    return _checked(saved["run"], step), {name: saved[name] for name in like}


def _checked(run: Any, step: int) -> dict:
    """The item ``run`` of a checkpoint, which anybody may have written.

    Raises:
      ValueError: if it is not what a run saves.
    """
    numbers = lambda record: (
        isinstance(record, dict)
        and all(isinstance(record.get(name), int | float) for name in RECORD)
    )
    if not (
        isinstance(run, dict)
        and isinstance(run.get("config"), dict)
        and isinstance(run.get("records"), list)
        and all(map(numbers, run["records"]))
        and all(record["step"] <= step for record in run["records"])
        and isinstance(run.get("seconds"), int | float)
        and isinstance(run.get("position"), dict)
        and isinstance(run.get("sizes"), list)
        # Runs before there were any have none.
        and isinstance(run.setdefault("classes", []), list)
    ):
        raise ValueError("its item `run` is not what a run saves")
    return run


def newest_readable(
    reader: ocp.CheckpointManager, read: Callable[[int], T]
) -> tuple[int | None, T | None, list[int]]:
    """Reads the newest checkpoint that can be read, and names those that cannot.

    Returns:
      Its step and what was read, if there is one, and the steps of those that are damaged.
    """
    damaged: list[int] = []
    for step in reversed(reader.all_steps()):
        try:
            return step, read(step), damaged
        except ConfigError:
            raise
        except (PermissionError, MemoryError) as error:
            # It may be whole, and older ones would fail likewise.
            raise ConfigError(f"{reader.directory / str(step)}: {one_line(error)}") from error
        except Exception as error:  # Orbax and TensorStore have many for damaged files.
            log.warning("%s: cannot be read (%s)", reader.directory / str(step), one_line(error))
            damaged.append(step)
    return None, None, damaged


def _last(workdir: Path, reader: ocp.CheckpointManager, like: dict) -> tuple[int, tuple]:
    """What :func:`read_items` gives of the newest checkpoint, of which there must be one."""
    step, saved, damaged = newest_readable(reader, lambda step: read_items(reader, step, like))
    if step is None:
        problem = "none of its checkpoints can be read" if damaged else "holds no checkpoint"
        raise ConfigError(f"{workdir}: {problem}")
    return step, saved


def config_of(run: dict) -> TrainConfig:
    """The config in the item ``run`` of a checkpoint, resolved."""
    return TrainConfig.from_json(run["config"]).resolved()


def best_step(records: list[dict], steps: set[int]) -> int | None:
    """The one of these steps that ended the epoch with the best test accuracy, if any ended one."""
    ended = [record for record in records if record["step"] in steps]
    return metrics.best(ended)["step"] if ended else None


def on_one_device(tree: Any) -> Any:
    """The shapes of a tree, each array whole on the first device of this process."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree)


def one_line(error: Exception) -> str:
    """What an error's message comes to: the end of its first line, where long ones get concrete."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    # TensorStore appends what it was asked for, as a page of JSON.
    for details in (" [tensorstore_spec", " [source locations", " See full TensorStore details"):
        line = line.partition(details)[0]
    return line if len(line) <= 160 else f"... {line[-160:]}"
