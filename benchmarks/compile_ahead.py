"""What a training step takes on TPUs that are not here: compiled for them, and never run.

    python -m benchmarks.compile_ahead --topology v5e:4x4 --arch resnet50 --dataset imagenet \
        --train_bs 2048 --precision bf16

takes the flags of ``train.py``, and prints what XLA says of the program: the memory of a device,
its arithmetic, the bytes that its operations read and write, each kind of collective, and how long
these take at the peak rates of that device. Some of the bytes stay on the chip, so that the time of
memory is an estimate from above. What does not fit is refused. No data is read: images of any data
set are an argument of the program, as those of ``imagenet`` are in training. ``--peer`` compiles
the same step of `linen_peer.py` instead.

It needs ``libtpu``, of JAX's extra ``tpu``, and no TPU.
"""

import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import tyro

from benchmarks.collectives import Collective, count, of_program
from input_pipeline.command_line import complain, parse
from training.config import TrainConfig
from training.errors import ConfigError


class Chip(NamedTuple):
    """What a chip can do at most.

    Attributes:
      flops: operations a second, in bfloat16.
      memory: bytes.
      bandwidth: bytes a second in and out of its memory.
      interconnect: bytes a second that it sends to its neighbours, over all links.
      options: what libtpu is to be told beside the topology.
    """

    flops: float
    memory: float
    bandwidth: float
    interconnect: float
    options: dict[str, str] = {}  # noqa: RUF012 (never changed)


# https://cloud.google.com/tpu/docs/v4, v5e, v5p and v6e (read in November 2026). Interconnect is
# half of what is given there as "bidirectional"; for v4, six links of 50 GB/s (Jouppi et al.,
# arXiv:2304.01433). A small slice has fewer links than a chip has ports.
CHIPS = {
    # Otherwise its two cores would be two devices. JAX on a TPU VM has one.
    "v4": Chip(275e12, 32 * 2**30, 1200e9, 300e9, {"chip_config_name": "megacore"}),
    "v5e": Chip(197e12, 16e9, 819e9, 200e9),
    "v5p": Chip(459e12, 95e9, 2765e9, 600e9),
    "v6e": Chip(918e12, 32e9, 1638e9, 400e9),
}


@dataclass(frozen=True)
class Options:
    """Compiles a training step for TPUs that are not here."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    topology: Annotated[str, tyro.conf.arg(metavar="KIND:SHAPE")] = "v5e:2x4"
    """Which TPUs, as in v5e:4x4 or v4:2x2x4."""
    peer: bool = False
    """Compile the ResNet-50 of Flax Linen with SGD instead."""


class Report(NamedTuple):
    """What a step takes on each device.

    Attributes:
      memory: bytes that are in use at once.
      flops: operations.
      moved: bytes that operations read and write, in its memory and on the chip.
      collectives: of the program, as :func:`~benchmarks.collectives.of_program` has them.
      loops: how many loops it has, of which XLA counts one round in ``flops`` and ``moved``.
    """

    memory: int
    flops: float
    moved: float
    collectives: list[Collective]
    loops: int


def main() -> int:
    """Prints the report; returns the exit code."""
    options = parse(Options, "python -m benchmarks.compile_ahead")
    try:
        config = options.config.resolved()
        chip = chip_of(options.topology)
        devices = find_devices(options.topology)
        print_report(options, chip, devices, compile_step(config, devices, options.peer))
    except ConfigError as error:
        complain(f"error: {error}")
        return 2
    return 0


def chip_of(topology: str) -> Chip:
    """Returns what the chips of a topology can do.

    Raises:
      ConfigError: if they are not known here.
    """
    kind = topology.partition(":")[0]
    if kind not in CHIPS:
        raise ConfigError(
            f"--topology {topology}: unknown; give one of {', '.join(CHIPS)} and a shape, as in "
            "v5e:4x4 or v4:2x2x4"
        )
    return CHIPS[kind]


def find_devices(topology: str) -> Sequence:
    """Returns the devices of a topology, for which programs can be compiled.

    Raises:
      ConfigError: if libtpu is missing, or knows no such topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("libtpu is missing, which compiles for TPUs: pip install 'jax[tpu]'")
    # There is no TPU that two processes could fight over, and none to ask what it is.
    for name, value in {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }.items():
        os.environ.setdefault(name, value)

    import jax
    from jax.experimental import topologies

    from training import sharding

    # Of all that is computed while a program is made.
    sharding.use_platform("cpu")
    try:
        options = chip_of(topology).options
        return topologies.get_topology_desc(topology, platform="tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition(": ")[2].partition("\n")[0]
        raise ConfigError(f"--topology {topology}: there is none ({reason})") from error


def compile_step(config: TrainConfig, devices: Sequence, peer: bool = False) -> Report:
    """Compiles a training step.

    Args:
      config: the resolved config of the run.
      devices: what to compile for.
      peer: whether the step is that of :mod:`benchmarks.linen_peer`.

    Raises:
      ConfigError: if the batch cannot be split over the devices, or the step does not fit into
        their memory.
    """
    import jax

    from training import sharding

    with jax.enable_x64(config.precision == "f64"):
        mesh = sharding.make_mesh(config, devices)
        lowered = (lower_peer if peer else lower_step)(config, mesh)
        try:
            program = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            needed = re.search(r"[^,:]*\([\d.]+.\) exceeds available HBM \([\d.]+.\)", str(error))
            raise ConfigError(
                f"--train_bs {config.train_bs}: does not fit into the memory of {len(devices)} x "
                f"{devices[0].device_kind}: "
                + (needed[0].strip() if needed else str(error).partition("\n")[0])
                + "; give a smaller batch, more devices, or the axis fsdp"
            ) from error
    memory, cost = program.memory_analysis(), program.cost_analysis()
    # The state is donated, so that outputs take the place of arguments.
    used = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    text = program.as_text()
    found, loops = of_program(text, len(devices)), text.count(" while(")
    return Report(used, cost["flops"], cost["bytes accessed"], found, loops)


def lower_step(config: TrainConfig, mesh, tx=None):
    """Lowers a training step on images that are an argument, as :mod:`training` makes it.

    Args:
      config: the resolved config of the run.
      mesh: the devices.
      tx: the optimiser, if not that of the config.
    """
    import jax

    from training import metrics
    from training.feeds import streamed
    from training.plan import make_plan

    plan = make_plan(config, mesh)
    if tx is not None:
        plan = plan._replace(tx=tx)
    step = streamed.streamed_step(plan)
    sums = jax.eval_shape(lambda: metrics.zero_train_metrics(plan.dtype))
    batch = streamed.abstract_batch(plan, config.train_bs)
    return step.lower(plan.abstract_state, sums, batch)


def lower_peer(config: TrainConfig, mesh):
    """Lowers the step of the peer, with the state whole on every device.

    Raises:
      ConfigError: for what it has not.
    """
    import jax
    import jax.numpy as jnp

    from benchmarks import linen_peer
    from training import sharding
    from training.state import DTYPES

    height, *_ = config.spec.image_shape
    if (config.arch, config.spec.num_classes) != ("resnet50", 1000):
        raise ConfigError("--peer: is resnet50 on imagenet")
    if mesh.shape["data"] != mesh.size:
        raise ConfigError(f"--mesh {config.mesh}: the peer is on data alone")
    dtype = DTYPES[config.precision][0]
    state, step = linen_peer.build(height, dtype)
    everywhere, split = sharding.replicated(mesh), sharding.over_batch(mesh)
    put = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)
    # Its pipeline casts images on the host.
    images = (config.train_bs, *config.spec.image_shape)
    images = jax.ShapeDtypeStruct(images, dtype, sharding=split)
    labels = jax.ShapeDtypeStruct(images.shape[:1], jnp.int32, sharding=split)
    program = jax.jit(step, donate_argnums=0, out_shardings=everywhere)
    return program.lower(jax.tree.map(put, state), images, labels)


def print_report(options: Options, chip: Chip, devices: Sequence, report: Report) -> None:
    """Prints what a step takes, and how long that is."""
    sent = sum(c.sent * c.times for c in report.collectives)
    seconds = {
        "arithmetic": report.flops / chip.flops,
        "memory": report.moved / chip.bandwidth,
        "interconnect": sent / chip.interconnect,
    }
    counts = count(report.collectives)
    ms = {name: f"{1e3 * s:.2f} ms" for name, s in seconds.items()}
    longest = max(seconds, key=seconds.__getitem__)
    images = options.config.train_bs / seconds[longest]
    lines = [
        ("devices", f"{len(devices)} x {devices[0].device_kind}, {options.topology}"),
        ("memory", f"{report.memory / 1e9:.2f} GB of {chip.memory / 1e9:.0f} GB"),
        ("arithmetic", f"{report.flops / 1e12:.3f} TFLOP, {ms['arithmetic']}"),
        ("moved", f"{report.moved / 1e9:.2f} GB, {ms['memory']}"),
        *((kind, f"{n}, {size / 1e6:.2f} MB") for kind, (n, size) in sorted(counts.items())),
        ("sent", f"{sent / 1e6:.2f} MB, {ms['interconnect']}"),
        ("roofline", f"{ms[longest]} a step, bound by {longest}: {images:,.0f} images a second"),
    ]
    if report.loops:
        lines.append(("loops", f"{report.loops}, counted once in arithmetic and moved"))
    for name, value in lines:
        print(f"{name:18s}  {value}")


if __name__ == "__main__":
    sys.exit(main())
