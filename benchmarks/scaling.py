"""What a training step sends between devices, read from the program that XLA compiles.

    python benchmarks/scaling.py

compiles a step of ResNet-50 for 1, 8, 64 and 256 virtual devices of a CPU, on the axes ``data`` and
``fsdp``, runs nothing, and counts the collectives of each step and the bytes of their results; then
the same with plain gradient descent in the place of AGD, which shows what AGD adds.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import tyro

sys.path.insert(0, os.fspath(Path(__file__).parent.parent))


@dataclasses.dataclass(frozen=True)
class Options:
    """Counts the collectives of a training step."""

    arch: str = "resnet50"
    """The network."""
    image_size: int = 224
    """Side of its images."""
    batch: int = 32
    """Images on each device."""
    devices: tuple[int, ...] = (1, 8, 64, 256)
    """How many devices."""
    axes: tuple[str, ...] = ("data", "fsdp")
    """Which axis of the mesh they are on."""


def main(options: Options) -> None:
    """Prints the table of ``benchmarks/scaling.md``."""
    print("devices  axis  optimiser  collective          count       MB")
    for devices in options.devices:
        for axis in options.axes if devices > 1 else ("data",):
            for optimiser in ("agd", "sgd"):
                found = in_new_process(options, f"{axis}={devices}", devices, optimiser)
                for name, (count, size) in found.items() or {"none": (0, 0)}.items():
                    row = f"{devices:7d}  {axis:4s}  {optimiser:9s}  {name:18s}"
                    print(f"{row}  {count:5d}  {size / 1e6:7.3f}", flush=True)


def in_new_process(
    options: Options, mesh: str, devices: int, optimiser: str
) -> dict[str, tuple[int, int]]:
    """:func:`collectives_of_step` where there are so many devices, which are fixed at the start."""
    arguments = (options.arch, options.image_size, options.batch * devices, mesh, optimiser)
    env = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, __file__, "--step", json.dumps(arguments)]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    if run.returncode:
        sys.exit(run.stderr)
    return json.loads(run.stdout.splitlines()[-1])


def collectives_of_step(
    arch: str, image_size: int, batch_size: int, mesh: str, optimiser: str
) -> dict[str, tuple[int, int]]:
    """Compiles a training step and counts what it sends.

    Returns:
      For each kind of collective, how many there are and the bytes of their results on a device.
    """
    import optax

    import agd_jax
    from benchmarks import collectives
    from benchmarks.compile_ahead import lower_step
    from models import cpu_convolution
    from training import sharding
    from training.config import TrainConfig

    # The virtual devices stand for accelerators, which are given no other form.
    cpu_convolution.form_of = lambda *_: "native"
    config = TrainConfig(
        arch=arch,
        dataset="imagenet",
        image_size=image_size,
        train_bs=batch_size,
        test_bs=batch_size,
        mesh=mesh,
    ).resolved()

    def sgd_like_agd():
        """Plain gradient descent, with a state of AGD's form for the step to read."""
        tx, state = optax.sgd(0.1), agd_jax.agd().init({})
        update = lambda grads, _, params: (tx.update(grads, tx.init(params))[0], state)
        return optax.GradientTransformation(lambda params: state, update)

    devices = sharding.make_mesh(config)
    tx = agd_jax.agd() if optimiser == "agd" else sgd_like_agd()
    program = lower_step(config, devices, tx).compile()
    return collectives.count(collectives.of_program(program.as_text(), devices.size))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--step"]:
        print(json.dumps(collectives_of_step(*json.loads(sys.argv[2]))))
    else:
        main(tyro.cli(Options, use_underscores=True))
