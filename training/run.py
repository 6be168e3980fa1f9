"""A run from its config to its report, and the evaluation of one that has ended."""

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
from etils import epath
from jax.sharding import Mesh

from input_pipeline.resident import Arrays
from training import compilation_cache, loop, metrics, multihost, sharding, workdir
from training.checkpoints import reading
from training.checkpoints.saving import Saver, Snapshot
from training.config import IDENTITY, OWN, TrainConfig
from training.data import load_data
from training.errors import ConfigError
from training.feeds import Feed, make_feed
from training.plan import Plan, make_plan
from training.records import EpochRecord
from training.reporting import console
from training.reporting.console import Console, EvalResult
from training.reporting.reporter import Reporter
from training.state import Graph, Model, TrainState

if TYPE_CHECKING:
    from input_pipeline.streaming import Sources

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """What a run ends with.

    Attributes:
      workdir: the folder with its files.
      records: its epochs.
      graphdef: ``nnx.merge(graphdef, state.params, state.batch_stats)`` is the network.
      state: the training state after the last step.
      averaged: the averaged network, with ``--average``.
    """

    workdir: epath.Path
    records: list[EpochRecord]
    graphdef: Graph
    state: TrainState
    averaged: Model | None


def train(config: TrainConfig) -> Result:
    """Trains a network as the config says, from where an earlier run in its workdir left off.

    Raises:
      ConfigError: if a flag cannot be followed.
      DataError: if the data set cannot be had.
      NonFiniteError: if the loss or the gradient stops being finite.
      ReadError: if data can no longer be read, or too many images not be decoded.
      SaveError: if the end could not be saved.
      Stopped: if a signal asked for it, once all is saved.
    """
    config = config.resolved()
    start(config)
    choose = lambda: os.fspath(workdir.choose(config))
    folder = epath.Path(multihost.broadcast_from_primary(choose))
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        mesh = enter(devices(config))
        data = load_data(config, () if config.restart else reading.saved_classes(folder))
        config = config.for_classes(data.classes)
        plan = make_plan(config, mesh)
        _check_batch_fits(config, data)
        hold = lambda: enter(workdir.held(folder)) or ""  # Only process 0.
        multihost.broadcast_from_primary(hold)
        multihost.check_shared(folder)
        set_aside = lambda: workdir.set_aside(folder, config.restart)
        aside = multihost.broadcast_from_primary(set_aside)
        saver = enter(Saver(folder, config, (data.train.size, data.test.size), data.classes))
        feed = enter(contextlib.closing(make_feed(plan, data)))
        saved = saver.restore(plan.abstract_state, feed.zero_metrics())
        records = saved.records if saved else []
        if saved:
            _check_progress(config, saved, feed.steps_per_epoch)
            feed.restore(saved.iterator_state, saved.step)

        facts = describe(plan, data, saved, aside)
        reporter: Console
        if multihost.is_primary():
            reporter = enter(Reporter(config, folder, facts, records))
        else:
            reporter = enter(Console(config.epochs, {}, quiet=True))
        snapshot = saved
        if snapshot is None or len(records) < config.epochs:
            reporter.compiling()
            snapshot = snapshot or _beginning(plan, feed)
            snapshot = loop.train_epochs(feed, snapshot, config.epochs, reporter, saver)
    return Result(folder, snapshot.records, plan.graphdef, snapshot.state, snapshot.averaged)


def evaluate(given: TrainConfig) -> list[EvalResult]:
    """Evaluates the best and the last checkpoint of a run, and prints what they reach.

    Args:
      given: its workdir, and where and how to evaluate. What the network is comes from the
        checkpoint.

    Raises:
      ConfigError: if there is no checkpoint, or it is of another run than the flags say.
      DataError: if the data set cannot be had.
    """
    given = given.to_evaluate()
    start(given)
    assert given.workdir is not None  # As to_evaluate has checked.
    folder = workdir.located(given.workdir)
    step, run, _ = multihost.in_every(lambda: reading.read_last(folder, {}))
    found = f"{step}, fingerprint {run.fingerprint()}"
    multihost.check_same(lambda: {"last checkpoint of --workdir": found})
    config = _merged(given, run.resolved_config())
    with devices(config) as mesh:
        data = load_data(config, run.classes)
        plan = make_plan(config, mesh)
        with contextlib.closing(make_feed(plan, data)) as feed:
            results = _evaluate(plan, feed, folder)
    if multihost.is_primary():
        console.print_results(results)
    return results


def _evaluate(plan: Plan, feed: Feed, folder: epath.Path) -> list[EvalResult]:
    names = ("averaged", "model") if plan.config.average else ("model",)
    target = dict.fromkeys(names, plan.abstract_state.model)

    def results(which: reading.Which, saved: reading.Saved) -> list[EvalResult]:
        epochs = saved.step / (saved.run.sizes[0] // plan.config.train_bs)
        labels = (which, f"{which} plain")
        sums = jax.device_get(feed.evaluate([saved.items[name] for name in names]))
        return [
            EvalResult(label, saved.step, epochs, **metrics.averages(each))
            for label, each in zip(labels, sums, strict=False)
        ]

    saved = reading.read_last(folder, target)
    last = results("last", saved)
    try:
        best = reading.read_best(folder, target, saved)
    except ConfigError as error:
        log.warning("%s", error)
        return last
    if best.step != saved.step:
        return results("best", best) + last
    return [each._replace(which=each.which.replace("last", "best")) for each in last] + last


def start(config: TrainConfig) -> None:
    """Meets the other processes, and finds the devices.

    Raises:
      ConfigError: if there are none, or other processes have been told other things. If devices
        cannot reach those of other processes, the process ends, with exit code 2.
    """
    sharding.use_platform(config.platform)
    multihost.initialize(config)
    try:
        sharding.find_devices(config.platform)
    except ConfigError as error:
        if not config.distribute:
            raise
        multihost.leave(str(error))
    multihost.introduce()
    # What is done comes first: the defaults of other flags follow from it.
    fields = {"eval_only": config.eval_only} | config.to_json()
    try:
        multihost.check_same(lambda: {f"--{k}": v for k, v in fields.items() if k not in OWN})
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition("\n")[0]
        multihost.leave(
            "--distribute: devices of different processes cannot reach each other; each process "
            f"needs its own ({reason})"
        )


@contextlib.contextmanager
def devices(config: TrainConfig) -> Iterator[Mesh]:
    """Returns the devices, which compute in the precision that the config asks for meanwhile."""
    with jax.enable_x64(config.precision == "f64"):
        mesh = sharding.make_mesh(config)
        compilation_cache.enable(mesh.devices.flat[0].platform)
        yield mesh


def _beginning(plan: Plan, feed: Feed) -> Snapshot:
    state = plan.create_train_state()
    return Snapshot(0, state, feed.zero_metrics(), 0, [], feed.iterator_state())


def describe(
    plan: Plan, data: "Arrays | Sources", saved: Snapshot | None, aside: str
) -> dict[str, str]:
    """What was resolved, as the first lines of a run say it.

    Args:
      plan: what is trained.
      data: what it is trained on.
      saved: where the run goes on, if it does.
      aside: where an earlier run's files have been moved, if they have.
    """
    config, leaves = plan.config, jax.tree.leaves(plan.abstract_state.params)
    device, size = plan.mesh.devices.flat[0], plan.mesh.devices.size
    train, test = data.train.size, data.test.size
    pixels = " x ".join(map(str, config.spec.image_shape))
    classes = f" of {config.num_classes} classes" if config.num_classes else ""
    batches = f"{train // config.train_bs:,} steps of {config.train_bs} images"
    facts = {
        "devices": f"{size} x {device.platform} ({device.device_kind})"
        + (f" of {jax.process_count()} processes" if jax.process_count() > 1 else "")
        + (f", mesh {config.mesh}" if config.mesh else ""),
        "data": f"{config.dataset}{classes}, {train:,} training and {test:,} test images "
        f"of {pixels}",
        "network": f"{config.arch}, {sum(p.size for p in leaves):,} parameters in "
        f"{len(leaves)} tensors",
        "training": f"{config.epochs} epochs of {batches}, {config.loss}, {config.precision}, "
        f"seed {config.seed}" + (", weights averaged" if config.average else ""),
    }
    if saved:
        done = f"{len(saved.records)} epochs done"
        facts["resumed"] = f"after step {saved.step:,}, with {done}"
        if len(saved.records) >= config.epochs:
            facts["resumed"] = f"{done} already, nothing is left to do; more --epochs go on"
    if aside:
        facts["set aside"] = f"the earlier run, in {aside}"
    return facts


def _check_batch_fits(config: TrainConfig, data: "Arrays | Sources") -> None:
    """Raises ConfigError if there is no full batch in the training set."""
    size = data.train.size
    if config.train_bs > size:
        raise ConfigError(
            f"--train_bs {config.train_bs}: larger than the training set of {config.dataset}; "
            f"it may be 1 to {size}"
        )


def _check_progress(config: TrainConfig, saved: Snapshot, steps_per_epoch: int) -> None:
    """Raises ConfigError if a run has been trained for longer than asked."""
    epochs = -(-saved.step // steps_per_epoch)
    if epochs > config.epochs:
        raise ConfigError(
            f"--epochs {config.epochs}: the run in {config.workdir} is in epoch {epochs} already; "
            f"give --epochs {epochs} or more, another --workdir, or --restart"
        )


def _merged(given: TrainConfig, saved: TrainConfig) -> TrainConfig:
    """The config of a run, tested where and how the flags say."""
    defaults = TrainConfig()
    explicit = [name for name in IDENTITY if getattr(given, name) != getattr(defaults, name)]
    given.check_same_run(saved, explicit)
    return dataclasses.replace(
        given,
        **{name: getattr(saved, name) for name in IDENTITY},
        data_dir=saved.data_dir if given.data_dir is None else given.data_dir,
    ).resolved()
