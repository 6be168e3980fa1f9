"""A run, from its config to its report."""

import contextlib
import functools
import os
from dataclasses import dataclass
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh

import agd_jax
from input_pipeline import sources
from input_pipeline.imagenet import Sources
from input_pipeline.sources import Arrays
from training import compilation_cache, epochs, network, processes, sharding, step, workdir
from training.checkpoints import Snapshot
from training.config import ConfigError, TrainConfig
from training.losses import LOSSES
from training.network import DTYPES
from training.reporting import Reporter, SilentReporter
from training.resident import ResidentRun
from training.saver import Saver
from training.state import Plan, TrainState, plan_state
from training.streamed import StreamedRun


@dataclass(frozen=True)
class Result:
    """What a run ends with.

    Attributes:
      workdir: the folder with its files.
      records: one dict for each epoch, as in ``metrics.jsonl``.
      graphdef: of the network; ``nnx.merge(graphdef, state.params, state.batch_stats)`` is it.
      state: after the last step.
    """

    workdir: Path
    records: list[dict]
    graphdef: nnx.GraphDef
    state: TrainState


def train(config: TrainConfig) -> Result:
    """Trains a network as the config says, from where an earlier run in its workdir left off.

    Raises:
      ConfigError: if a flag cannot be followed.
      DataError: if the data set cannot be had.
      NonFiniteError: if the loss or the gradient stops being finite.
      SaveError: if the end could not be saved.
      Stopped: if a signal asked for it, once all is saved.
    """
    config = config.resolved()
    sharding.use_platform(config.platform)
    processes.initialize(config)
    sharding.find_devices(config.platform)
    folder = Path(processes.decide(lambda: os.fspath(workdir.choose(config))))
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(jax.enable_x64(config.precision == "f64"))
        mesh = sharding.make_mesh(config)
        compilation_cache.enable(mesh.devices.flat[0].platform)
        data = load_data(config)
        check_batch_fits(config, data)
        plan = build_plan(config, mesh)
        aside = processes.decide(lambda: enter(workdir.held(folder, config.restart)))
        sizes = data.train.size, data.test.size
        saver = enter(Saver(folder, config, sizes, data.classes))
        run = enter(contextlib.closing(build_run(config, mesh, data, plan)))
        saved = saver.restore(plan.shapes, run.no_metrics())
        if saved:
            _check_epochs(config, saved, run.steps_per_epoch)
            run.restore(saved.position, saved.step)

        facts = describe(config, mesh, data, plan.shapes)
        if saved:
            done = f"{len(saved.records)} epochs done"
            facts["resumed"] = f"after step {saved.step:,}, with {done}"
            if len(saved.records) >= config.epochs:
                facts["resumed"] = f"{done} already, nothing is left to do; more --epochs go on"
        if aside:
            facts["set aside"] = f"the earlier run, in {aside}"
        reporter_class = Reporter if processes.first() else SilentReporter
        records = saved.records if saved else []
        reporter = enter(reporter_class(config, folder, facts, records))
        reporter.compiling()
        snapshot = saved or Snapshot(0, plan.init(), run.no_metrics(), 0, [], run.position())
        if len(records) < config.epochs:
            snapshot = epochs.train_epochs(config, run, snapshot, reporter, saver)
    return Result(folder, snapshot.records, plan.graphdef, snapshot.state)


def load_data(config: TrainConfig) -> Arrays | Sources:
    """Loads a small data set, or finds a large one."""
    if not config.spec.streamed:
        return sources.load(config.spec, config.data_dir)
    from input_pipeline import imagenet, synthetic

    if not config.spec.stored:
        return synthetic.sources(config.train_bs, config.test_bs)
    return imagenet.find(config.spec, config.data_dir)


def check_batch_fits(config: TrainConfig, data: Arrays | Sources) -> None:
    """Raises ConfigError if there is no full batch in the training set."""
    size = data.train.size
    if config.train_bs > size:
        raise ConfigError(
            f"--train_bs {config.train_bs}: larger than the training set of {config.dataset}; "
            f"it may be 1 to {size}"
        )


def _check_epochs(config: TrainConfig, saved: Snapshot, steps_per_epoch: int) -> None:
    """Raises ConfigError if a run has been trained for longer than it is asked to be."""
    epochs = -(-saved.step // steps_per_epoch)
    if epochs > config.epochs:
        raise ConfigError(
            f"--epochs {config.epochs}: {config.workdir} holds a run that is at step "
            f"{saved.step:,}, of epoch {epochs}; give as many, another --workdir, or --restart"
        )


def build_plan(config: TrainConfig, mesh: Mesh) -> Plan:
    """Plans the network and the state that training starts from."""
    key = jax.random.key(config.seed)
    shardings = functools.partial(sharding.of_state, mesh)
    make_model = functools.partial(network.create, config)
    return plan_state(make_model, agd_jax.agd(gain=config.gain), key, shardings)


def build_run(
    config: TrainConfig, mesh: Mesh, data: Arrays | Sources, plan: Plan
) -> ResidentRun | StreamedRun:
    """Puts the data on the devices, or on their way, and builds the programs that use them."""
    loss = LOSSES[config.loss]
    common = {
        "train_step": functools.partial(
            step.train_step, plan.graphdef, agd_jax.agd(gain=config.gain), loss
        ),
        "eval_step": functools.partial(step.eval_step, plan.graphdef, loss),
        "train_bs": config.train_bs,
        "test_bs": config.test_bs,
        "dtype": DTYPES[config.precision][1],
        "mesh": mesh,
        "shardings": sharding.of_state(mesh, plan.shapes),
    }
    if config.spec.streamed:
        train, test = open_streams(config, mesh, data)
        return StreamedRun(config.spec, train, test, data, **common)
    return ResidentRun(
        config.spec,
        data,
        # The starting weights are drawn from the seed's key itself.
        key=jax.random.fold_in(jax.random.key(config.seed), 1),
        convolutional=any(p.ndim == 4 for p in jax.tree.leaves(plan.shapes.params)),
        **common,
    )


def open_streams(config: TrainConfig, mesh: Mesh, data: Sources) -> tuple:
    """The training and the test batches of a large data set."""
    from input_pipeline import streaming, synthetic

    over_batch = sharding.over_batch(mesh)
    if not config.spec.stored:
        return tuple(
            synthetic.NoiseStream(config.spec, batch_size, over_batch)
            for batch_size in (config.train_bs, config.test_bs)
        )
    workers = streaming.default_workers() if config.workers is None else config.workers
    train = streaming.train_stream(
        config.spec,
        data.train,
        seed=config.seed,
        epochs=config.epochs,
        batch_size=config.train_bs,
        sharding=over_batch,
        workers=workers,
    )
    test = streaming.eval_stream(
        config.spec,
        data.test,
        batch_size=config.test_bs,
        sharding=over_batch,
        workers=workers,
    )
    return train, test


def describe(
    config: TrainConfig, mesh: Mesh, data: Arrays | Sources, shapes: TrainState
) -> dict[str, str]:
    """What was resolved, as the first lines of a run say it."""
    leaves = jax.tree.leaves(shapes.params)
    device, size = mesh.devices.flat[0], mesh.devices.size
    train, test = data.train.size, data.test.size
    pixels = " x ".join(map(str, config.spec.image_shape))
    batches = f"{train // config.train_bs:,} steps of {config.train_bs} pictures"
    return {
        "devices": f"{size} x {device.platform} ({device.device_kind})"
        + (f" of {jax.process_count()} processes" if jax.process_count() > 1 else "")
        + (f", mesh {config.mesh}" if config.mesh else ""),
        "data": f"{config.dataset}, {train:,} training and {test:,} test pictures of {pixels}",
        "network": f"{config.arch}, {sum(p.size for p in leaves):,} parameters in "
        f"{len(leaves)} tensors",
        "training": f"{config.epochs} epochs of {batches}, {config.loss}, {config.precision}, "
        f"seed {config.seed}",
    }
