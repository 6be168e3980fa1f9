"""A run, from its config to its report."""

import contextlib
import functools
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

import agd_jax
import models
from input_pipeline import sources
from input_pipeline.imagenet import Sources
from input_pipeline.sources import Arrays
from training import metrics, processes, sharding, step, workdir
from training.config import ConfigError, TrainConfig
from training.losses import LOSSES
from training.reporting import Reporter, SilentReporter
from training.resident import ResidentRun
from training.state import TrainState, create_state
from training.streamed import StreamedRun

# --precision -> dtype of the network's arithmetic, and of everything else.
DTYPES = {
    "f32": (jnp.float32, jnp.float32),
    "bf16": (jnp.bfloat16, jnp.float32),
    "f64": (jnp.float64, jnp.float64),
}

# A dispatch takes about as many steps as fit in this: few enough for a live bar, enough for
# the cost of a dispatch not to matter.
DISPATCH_SECONDS = 0.25

# Several processes must dispatch the same steps, and so cannot go by their clocks.
DISPATCHES_PER_EPOCH = 20


class NonFiniteLossError(Exception):
    """The loss of a training step was infinite or not a number."""


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
    """Trains a network as the config says.

    Raises:
      ConfigError: if a flag cannot be followed.
      DataError: if the data set cannot be had.
      NonFiniteLossError: if the loss stops being finite.
    """
    config = config.resolved()
    sharding.use_platform(config.platform)
    processes.initialize(config)
    folder = Path(processes.decide(lambda: os.fspath(workdir.choose(config))))
    with jax.enable_x64(config.precision == "f64"):
        mesh = sharding.make_mesh(config)
        reporter_class = Reporter if processes.first() else SilentReporter
        data = load_data(config)
        check_batch_fits(config, data)
        graphdef, state = build_state(config, mesh)
        with (
            reporter_class(config, folder, describe(config, mesh, data, state)) as reporter,
            contextlib.closing(build_run(config, mesh, data, graphdef, state)) as run,
        ):
            start = time.perf_counter()
            state = run.compile(state)
            reporter.begin(time.perf_counter() - start)
            for epoch in range(1, config.epochs + 1):
                state, record = train_epoch(run, state, epoch, reporter)
                reporter.epoch(record)
    return Result(folder, reporter.records, graphdef, state)


def load_data(config: TrainConfig) -> Arrays | Sources:
    """Loads a small data set, or finds a large one."""
    if not config.spec.streamed:
        return sources.load(config.spec, config.data_dir)
    from input_pipeline import imagenet, synthetic

    if config.spec.tfds_name is None:
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


def build_state(config: TrainConfig, mesh: Mesh) -> tuple[nnx.GraphDef, TrainState]:
    """Makes the network and the state that training starts from."""
    spec, (dtype, param_dtype) = config.spec, DTYPES[config.precision]
    options = {"depth": config.depth, "width": config.width} if config.arch == "fcn" else {}

    def make_model() -> nnx.Module:
        return models.create(
            config.arch,
            spec.image_shape,
            spec.num_classes,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=nnx.Rngs(0),
            **options,
        )

    key = jax.random.key(config.seed)
    shardings = functools.partial(sharding.of_state, mesh)
    return create_state(make_model, agd_jax.agd(config.gain), key, shardings)


def build_run(
    config: TrainConfig,
    mesh: Mesh,
    data: Arrays | Sources,
    graphdef: nnx.GraphDef,
    state: TrainState,
) -> ResidentRun | StreamedRun:
    """Puts the data on the devices, or on their way, and builds the programs that use them."""
    loss = LOSSES[config.loss]
    common = {
        "train_step": functools.partial(step.train_step, graphdef, agd_jax.agd(config.gain), loss),
        "eval_step": functools.partial(step.eval_step, graphdef, loss),
        "train_bs": config.train_bs,
        "test_bs": config.test_bs,
        "dtype": DTYPES[config.precision][1],
        "mesh": mesh,
        "shardings": sharding.of_state(mesh, state),
    }
    if config.spec.streamed:
        train, test = open_streams(config, mesh, data)
        return StreamedRun(config.spec, train, test, data, **common)
    return ResidentRun(
        config.spec,
        data,
        # The starting weights are drawn from the seed's key itself.
        key=jax.random.fold_in(jax.random.key(config.seed), 1),
        convolutional=any(p.ndim == 4 for p in jax.tree.leaves(state.params)),
        **common,
    )


def open_streams(config: TrainConfig, mesh: Mesh, data: Sources) -> tuple:
    """The training and the test batches of a large data set."""
    from input_pipeline import streaming, synthetic

    over_batch = sharding.over_batch(mesh)
    if config.spec.tfds_name is None:
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


def train_epoch(
    run: ResidentRun | StreamedRun, state: TrainState, epoch: int, reporter: Reporter
) -> tuple[TrainState, dict]:
    """Trains for an epoch, the first being 1, and tests.

    Returns:
      The state, and the epoch's line in ``metrics.jsonl``.

    Raises:
      NonFiniteLossError: if the loss stops being finite.
    """
    start = time.perf_counter()
    stop, last = (epoch - 1) * run.steps_per_epoch, epoch * run.steps_per_epoch
    sums, steps = run.no_metrics(), 1
    if jax.process_count() > 1:
        steps = -(-run.steps_per_epoch // DISPATCHES_PER_EPOCH)
    while stop < last:
        stop = min(stop + steps, last)
        before, (state, sums) = sums, run.train(state, sums, stop)
        # The host waits for the dispatch before this one, the device for nothing.
        seen, seconds = jax.device_get(before), time.perf_counter() - start
        if not math.isfinite(seen.sums.loss):
            break
        if seen.steps:
            if jax.process_count() == 1:
                steps = max(1, int(seen.steps * DISPATCH_SECONDS / seconds))
            speed = {"images_per_second": float(seen.sums.examples) / seconds}
            done = float(seen.steps) / run.steps_per_epoch
            reporter.progress(epoch, done, metrics.train_averages(seen) | speed)
    sums, seconds = jax.device_get(sums), time.perf_counter() - start
    if not math.isfinite(sums.sums.loss):
        bad_step = last - run.steps_per_epoch + int(sums.steps)
        raise NonFiniteLossError(
            f"the loss was {sums.sums.loss} at step {bad_step} (epoch {epoch})"
        )

    test_sums = jax.device_get(run.evaluate(state))
    trained, tested = metrics.train_averages(sums), metrics.averages(test_sums)
    return state, {
        "epoch": epoch,
        "step": last,
        "train_loss": trained.pop("loss"),
        "train_accuracy": trained.pop("accuracy"),
        "test_loss": tested["loss"],
        "test_accuracy": tested["accuracy"],
        **trained,
        "seconds": seconds,
        "images_per_second": float(sums.sums.examples) / seconds,
        **run.counts(sums.sums, test_sums),
    }


def describe(
    config: TrainConfig, mesh: Mesh, data: Arrays | Sources, state: TrainState
) -> dict[str, str]:
    """What was resolved, as the first lines of a run say it."""
    leaves = jax.tree.leaves(state.params)
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
