"""Saves checkpoints during a run, and resumes a run from them."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import shutil
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from input_pipeline import cloud
from training import multihost, sharding
from training.checkpoints.reading import (
    RunItem,
    Saved,
    folder_of,
    newest_readable,
    one_line,
    read_items,
    reading,
)
from training.config import TrainConfig
from training.errors import ConfigError, SaveError
from training.metrics import TrainMetrics
from training.records import EpochRecord, best, best_step
from training.workdir import unused

if TYPE_CHECKING:
    from training.state import Model, TrainState

log = logging.getLogger(__name__)

# Successive best epochs that are fewer seconds apart than this share a checkpoint.
BEST_SECONDS = 10

# Bytes of a checkpoint besides its arrays.
SMALL_FILES = 200_000

# The suffix of a checkpoint that cannot be read.
DAMAGED = ".damaged"


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The state of a run between two steps.

    Attributes:
      step: the number of steps taken.
      state: the training state after these steps.
      sums: the metrics of the current epoch so far.
      seconds: how long that epoch has been trained, in seconds.
      records: the records of the epochs before it.
      iterator_state: the position in the training data, as JSON values.
      averaged: with ``--average``, the averaged network as it was last evaluated; None before.
    """

    step: int
    state: TrainState
    sums: TrainMetrics
    seconds: float
    records: list[EpochRecord]
    iterator_state: dict[str, Any]
    averaged: Model | None = None


class Saver:
    """Saves the checkpoints of a run; a context manager around the run.

    A save that fails logs a warning, and earlier checkpoints stay. An error is raised only by
    :meth:`finish` and, where there are several processes, in a process in which Orbax failed. All
    processes must call the same methods in the same order.
    """

    def __init__(
        self,
        workdir: epath.Path,
        config: TrainConfig,
        sizes: tuple[int, int],
        classes: Sequence[str],
    ):
        """Opens the checkpoint folder, and creates it if it does not exist.

        Args:
          workdir: the folder of the run.
          config: the resolved config of the run.
          sizes: the sizes of the training and the test set.
          classes: the names of the classes, in the order of the labels.
        """
        self._folder = folder_of(workdir)
        self._config, self._sizes, self._classes = config, sizes, classes
        self._seconds, self._steps = config.save_interval
        # The newest, and the one of the best epoch.
        self._preserved = preservation_policy.AnyPreservationPolicy(
            [preservation_policy.LatestN(config.keep)]
        )
        self._manager = self._open()
        self._held: Snapshot | None = None
        # The step and the number of epochs of the newest checkpoint.
        self._saved: tuple[int, int] | None = None
        self._last_save = time.monotonic()
        self._failure: str | None = None

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._preserved,
            cleanup_tmp_directories=True,
            lightweight_initialize=True,
        )
        return ocp.CheckpointManager(self._folder, options=options)

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Saving takes all processes, and it may be that only this one has failed.
        if kind is None or jax.process_count() == 1:
            self.last_good()
            self._manager.close()

    def restore(self, state: TrainState, sums: TrainMetrics) -> Snapshot | None:
        """Reads the newest checkpoint that can be read, if there is one.

        Newer ones that cannot be read are logged, and renamed ``*.damaged``.

        Args:
          state: the shapes of the training state, with shardings.
          sums: the metrics of no steps, which have the shapes of the saved metrics.

        Raises:
          ConfigError: if it belongs to another run, or there are checkpoints but none can be read.
        """
        target = _models(self._config, state, None) | {
            "training": {"step": state.step, "opt_state": state.opt_state, "sums": sums},
        }
        if jax.process_count() == 1:
            found = self._newest(target)
        else:
            # The primary looks for all: if one failed to read, the others would wait for it.
            on_host = jax.tree.map(
                lambda x: np.broadcast_to(np.zeros([], x.dtype), x.shape), target
            )
            look = lambda: str(saved.step if (saved := self._newest(on_host)) else "")
            newest = multihost.broadcast_from_primary(look)
            with reading(self._folder) as reader:
                found = read_items(reader, int(newest), target) if newest else None
        if found is None:
            return None
        step, run, arrays = found
        # Arrays that Orbax has read share its memory, which donated buffers must not do.
        arrays = sharding.copy(arrays)
        training = arrays["training"]
        state = dataclasses.replace(
            state, step=training["step"], opt_state=training["opt_state"], **arrays["model"]
        )
        # Some checkpoints may have been renamed.
        self._manager.close()
        self._manager = self._open()
        self._saved = step, len(run.records)
        averaged = arrays.get("averaged") if run.records else None
        return Snapshot(
            step, state, training["sums"], run.seconds, run.records, run.position, averaged
        )

    def _newest(self, target: dict[str, Any]) -> Saved | None:
        """Reads the newest checkpoint that can be read, in one process."""

        def read(step: int) -> Saved:
            run = read_items(reader, step, {}).run
            self._config.check_same_run(run.resolved_config())
            if tuple(run.sizes) != self._sizes:
                raise ConfigError(
                    f"--dataset {self._config.dataset}: has {' and '.join(map(str, self._sizes))} "
                    f"images; {self._config.workdir} holds a run on "
                    f"{' and '.join(map(str, run.sizes))}"
                )
            return read_items(reader, step, target)

        with reading(self._folder) as reader:
            found, damaged = newest_readable(reader, read)
        if damaged and found is None:
            raise ConfigError(
                f"--workdir {self._config.workdir}: none of its checkpoints can be read; --restart "
                "begins afresh, and sets them aside"
            )
        for number in damaged:
            path = self.path_of(number)
            path.rename(unused(path.with_name(path.name + DAMAGED)))
        return found

    def next_step(self, step: int) -> float:
        """Returns the next step after this one at which ``--save_every`` asks for a save."""
        return math.inf if self._steps is None else (step // self._steps + 1) * self._steps

    def due(self, step: int) -> bool:
        """Returns whether ``--save_every`` asks for a save after this step."""
        return self._steps is not None and step % self._steps == 0

    def overdue(self, best: bool = False) -> bool:
        """Returns whether ``--save_every`` asks for a save at this time.

        Args:
          best: whether this is the end of the best epoch so far, which is saved sooner.
        """
        seconds = time.monotonic() - self._last_save
        return seconds >= (min(self._seconds, BEST_SECONDS) if best else self._seconds)

    def hold(self, snapshot: Snapshot) -> None:
        """Keeps a copy of the best epoch on the devices, to be saved before the next checkpoint."""
        self._held = dataclasses.replace(snapshot, state=sharding.copy(snapshot.state))

    def save(self, snapshot: Snapshot) -> None:
        """Starts to save, and returns once the state may be donated."""
        if snapshot.records and best(snapshot.records).step == snapshot.step:
            # This epoch is better than the one held.
            self._held = None
        self._write_held()
        self._write(snapshot)
        self._last_save = time.monotonic()

    def last_good(self) -> epath.Path | None:
        """Completes all saves, and returns the newest checkpoint, if there is one."""
        self._write_held()
        self._wait()
        step = self._manager.latest_step()
        return None if step is None else self.path_of(step)

    def path_of(self, step: int) -> epath.Path:
        """Returns the folder of a checkpoint."""
        return self._folder / str(step)

    def finish(self) -> None:
        """Waits for the last save.

        Raises:
          SaveError: if the last save failed.
        """
        self._wait()
        if self._failure is not None:
            raise SaveError(self._failure)

    def _write_held(self) -> None:
        if self._held is not None:
            held, self._held = self._held, None
            self._write(held)

    def _write(self, snapshot: Snapshot) -> None:
        self._wait()
        step, state, saved = snapshot.step, snapshot.state, self._saved
        if saved == (step, len(snapshot.records)):
            return
        run = RunItem(
            self._config.to_json(),
            snapshot.records,
            snapshot.seconds,
            snapshot.iterator_state,
            list(self._sizes),
            list(self._classes),
        )
        training = {"step": state.step, "opt_state": state.opt_state, "sums": snapshot.sums}
        arrays = _models(self._config, state, snapshot.averaged) | {"training": training}
        items = ocp.args.Composite(
            run=ocp.args.JsonSave(run.to_json()),
            **{name: ocp.args.StandardSave(tree) for name, tree in arrays.items()},
        )
        self._failure = None
        if lack := multihost.broadcast_from_primary(lambda: _lack_of_space(self._folder, arrays)):
            self._failed(lack)
            return
        steps = {*self._manager.all_steps(), step}
        top = preservation_policy.CustomSteps([best_step(snapshot.records, steps)])
        self._preserved.policies[1:] = [top]
        try:
            if saved and saved[0] == step:  # Without the evaluation, which had been stopped.
                self._manager.delete(step)
            self._manager.save(step, args=items)
            self._saved = step, len(snapshot.records)
        except Exception as error:  # Orbax and TensorStore raise many for a full disk.
            self._failed_here(error)

    def _wait(self) -> None:
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._failed_here(error)

    def _failed_here(self, error: Exception) -> None:
        """Handles a failure of Orbax in this process, and perhaps in no other."""
        if jax.process_count() > 1:
            # The others would wait for this process in the next save.
            raise SaveError(f"cannot save in {self._folder}: {one_line(error)}") from error
        # A new manager does not know of the failure, and removes the files that it left.
        with contextlib.suppress(Exception):
            self._manager.close()
        self._manager = self._open()
        self._saved = None
        self._failed(one_line(error))

    def _failed(self, why: str) -> None:
        self._failure = f"cannot save in {self._folder}: {why}"
        log.warning("%s; the checkpoints before this one stay", self._failure)


def _models(config: TrainConfig, state: TrainState, averaged: Model | None) -> dict[str, Model]:
    """Returns the networks of a checkpoint by the names of their items.

    Until an averaged network has been evaluated, it is the network itself.
    """
    models = {"model": state.model}
    return models | {"averaged": averaged or state.model} if config.average else models


def _lack_of_space(folder: epath.Path, arrays: dict[str, Any]) -> str:
    """Returns why a save may well fail, else ''. Orbax's own message would take many lines."""
    if cloud.is_remote(folder):
        return ""
    # Compression may save some of this, but not much for random values.
    needed = sum(array.nbytes for array in jax.tree.leaves(arrays)) + SMALL_FILES
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:  # The workdir has been moved away.
        return str(error.strerror)
    return "" if free >= needed else f"{needed / 1e6:,.1f} MB needed, {free / 1e6:,.1f} MB free"
