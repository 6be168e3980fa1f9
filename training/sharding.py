"""Where arrays live: the mesh of devices, and what is split over it."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from training.config import ConfigError, TrainConfig


def make_mesh(config: TrainConfig) -> Mesh:
    """All devices of the platform on one axis, ``data``.

    Raises:
      ConfigError: if there is no such device, or a batch cannot be shared by all of them.
    """
    if config.platform:
        # JAX_PLATFORMS takes no "gpu": there are two kinds.
        names = "cuda,rocm" if config.platform == "gpu" else config.platform
        jax.config.update("jax_platforms", names)
    try:
        devices = jax.devices()
    except RuntimeError as error:
        raise ConfigError(
            f"--platform {config.platform}: JAX finds no such device; leave the flag out, or "
            f"install the JAX that has it ({str(error).splitlines()[0]})"
        ) from error
    for flag in ("train_bs", "test_bs"):
        _check_divides(flag, getattr(config, flag), len(devices))
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
    """The first axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def _check_divides(flag: str, batch_size: int, devices: int) -> None:
    if batch_size % devices:
        below = batch_size // devices * devices
        near = f"{below} or {below + devices}" if below else str(devices)
        raise ConfigError(
            f"--{flag} {batch_size}: not a multiple of the {devices} devices; {near} would be"
        )
