"""Testing what a run has left, by the program that tested it while it was trained."""

import contextlib
import dataclasses
import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp

from training import checkpoints, compilation_cache, loop, metrics, processes, sharding
from training.checkpoints import Saved, Which
from training.config import IDENTITY, ConfigError, TrainConfig
from training.state import TrainState

log = logging.getLogger(__name__)


class Tested(NamedTuple):
    """A checkpoint and what its test gave.

    Attributes:
      which: "best" or "last".
      step: of the checkpoint.
      epochs: that it has been trained for, perhaps a part of one.
      loss: over the test set.
      accuracy: over the test set, 0 to 1.
    """

    which: Which
    step: int
    epochs: float
    loss: float
    accuracy: float


def evaluate(given: TrainConfig) -> list[Tested]:
    """Tests the best and the last checkpoint of a run.

    Args:
      given: its workdir, and where and how to test. What the network is comes from the checkpoint.

    Raises:
      ConfigError: if there is no checkpoint, or it is of another run than the flags say.
      DataError: if the data set cannot be had.
    """
    given = given.to_test()
    sharding.use_platform(given.platform)
    processes.initialize(given)
    sharding.find_devices(given.platform)
    workdir = given.workdir.expanduser()
    config = _merged(given, checkpoints.saved_config(workdir))
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.enable_x64(config.precision == "f64"))
        mesh = sharding.make_mesh(config)
        compilation_cache.enable(mesh.devices.flat[0].platform)
        data = loop.load_data(config)
        plan = loop.build_plan(config, mesh)
        run = stack.enter_context(contextlib.closing(loop.build_run(config, mesh, data, plan)))
        like = {"params": plan.shapes.params, "batch_stats": plan.shapes.batch_stats}

        def tested(which: Which, saved: Saved) -> Tested:
            state = TrainState(step=jnp.int32(saved.step), opt_state=(), **saved.model)
            averages = metrics.averages(jax.device_get(run.evaluate(state)))
            return Tested(which, saved.step, saved.step / run.steps_per_epoch, **averages)

        saved = checkpoints.read_last(workdir, like)
        last = tested("last", saved)
        try:
            best = checkpoints.read_best(workdir, like, saved)
        except ConfigError as error:
            log.warning("%s", error)
            return [last]
        if best.step == last.step:
            return [last._replace(which="best"), last]
        return [tested("best", best), last]


def _merged(given: TrainConfig, saved: TrainConfig) -> TrainConfig:
    """The config of a run, tested where and how the flags say."""
    defaults = TrainConfig()
    explicit = [name for name in IDENTITY if getattr(given, name) != getattr(defaults, name)]
    given.check_same_run(saved, explicit)
    return dataclasses.replace(
        given,
        **{name: getattr(saved, name) for name in IDENTITY},
        data_dir=given.data_dir or saved.data_dir,
    ).resolved()
