"""A run, from its config to its report."""

import functools
import math
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
from input_pipeline.sources import Arrays
from input_pipeline.specs import SPECS
from training import metrics, sharding, step, workdir
from training.config import ConfigError, TrainConfig
from training.losses import LOSSES
from training.programs import Programs
from training.reporting import Reporter
from training.state import TrainState, create_state

# --precision -> dtype of the network's arithmetic, and of everything else.
DTYPES = {
    "f32": (jnp.float32, jnp.float32),
    "bf16": (jnp.bfloat16, jnp.float32),
    "f64": (jnp.float64, jnp.float64),
}

# A dispatch takes about as many steps as fit in this: few enough for a live bar, enough for
# the cost of a dispatch not to matter.
DISPATCH_SECONDS = 0.25


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
    folder = workdir.choose(config)
    with jax.enable_x64(config.precision == "f64"):
        mesh = sharding.make_mesh(config)
        data = sources.load(SPECS[config.dataset], config.data_dir)
        check_batch_fits(config, data)
        graphdef, state = build_state(config, mesh)
        run = build_programs(config, mesh, data, graphdef, state)
        with Reporter(config, folder, describe(config, mesh, data, state)) as reporter:
            start = time.perf_counter()
            state = run.compile(state)
            reporter.begin(time.perf_counter() - start)
            for epoch in range(1, config.epochs + 1):
                state, record = train_epoch(run, state, epoch, reporter)
                reporter.epoch(record)
    return Result(folder, reporter.records, graphdef, state)


def check_batch_fits(config: TrainConfig, data: Arrays) -> None:
    """Raises ConfigError if there is no full batch in the training set."""
    size = len(data.train.labels)
    if config.train_bs > size:
        raise ConfigError(
            f"--train_bs {config.train_bs}: larger than the training set of {config.dataset}; "
            f"it may be 1 to {size}"
        )


def build_state(config: TrainConfig, mesh: Mesh) -> tuple[nnx.GraphDef, TrainState]:
    """Makes the network and the state that training starts from."""
    spec, (dtype, param_dtype) = SPECS[config.dataset], DTYPES[config.precision]
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
    return create_state(make_model, agd_jax.agd(config.gain), key, sharding.replicated(mesh))


def build_programs(
    config: TrainConfig, mesh: Mesh, data: Arrays, graphdef: nnx.GraphDef, state: TrainState
) -> Programs:
    """Puts the data on the devices, and builds the programs that train and test on them."""
    loss = LOSSES[config.loss]
    return Programs(
        SPECS[config.dataset],
        data,
        train_step=functools.partial(step.train_step, graphdef, agd_jax.agd(config.gain), loss),
        eval_step=functools.partial(step.eval_step, graphdef, loss),
        # The starting weights are drawn from the seed's key itself.
        key=jax.random.fold_in(jax.random.key(config.seed), 1),
        train_bs=config.train_bs,
        test_bs=config.test_bs,
        dtype=DTYPES[config.precision][1],
        mesh=mesh,
        convolutional=any(p.ndim == 4 for p in jax.tree.leaves(state.params)),
    )


def train_epoch(
    run: Programs, state: TrainState, epoch: int, reporter: Reporter
) -> tuple[TrainState, dict]:
    """Trains for an epoch, the first being 1, and tests.

    Returns:
      The state, and the epoch's line in ``metrics.jsonl``.

    Raises:
      NonFiniteLossError: if the loss stops being finite.
    """
    start = time.perf_counter()
    order = run.shuffle(epoch)
    stop, last = (epoch - 1) * run.steps_per_epoch, epoch * run.steps_per_epoch
    sums, steps = run.no_metrics(), 1
    while stop < last:
        stop = min(stop + steps, last)
        before, (state, sums) = sums, run.train(state, sums, order, stop)
        # The host waits for the dispatch before this one, the device for nothing.
        seen, seconds = jax.device_get(before), time.perf_counter() - start
        if seen.steps:
            steps = max(1, int(seen.steps * DISPATCH_SECONDS / seconds))
            speed = {"images_per_second": float(seen.sums.examples) / seconds}
            done = float(seen.steps) / run.steps_per_epoch
            reporter.progress(epoch, done, metrics.train_averages(seen) | speed)
    tested = run.evaluate(state)
    sums, seconds = jax.device_get(sums), time.perf_counter() - start
    if not math.isfinite(sums.sums.loss):
        raise NonFiniteLossError(
            f"the loss was {sums.sums.loss} at step {state.step} (epoch {epoch})"
        )

    trained, tested = metrics.train_averages(sums), metrics.averages(jax.device_get(tested))
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
    }


def describe(config: TrainConfig, mesh: Mesh, data: Arrays, state: TrainState) -> dict[str, str]:
    """What was resolved, as the first lines of a run say it."""
    leaves = jax.tree.leaves(state.params)
    device, size = mesh.devices.flat[0], mesh.devices.size
    train, test = data.train.labels.size, data.test.labels.size
    pixels = " x ".join(map(str, data.train.images.shape[1:]))
    batches = f"{train // config.train_bs:,} steps of {config.train_bs} pictures"
    return {
        "devices": f"{size} x {device.platform} ({device.device_kind})",
        "data": f"{config.dataset}, {train:,} training and {test:,} test pictures of {pixels}",
        "network": f"{config.arch}, {sum(p.size for p in leaves):,} parameters in "
        f"{len(leaves)} tensors",
        "training": f"{config.epochs} epochs of {batches}, {config.loss}, {config.precision}, "
        f"seed {config.seed}",
    }
