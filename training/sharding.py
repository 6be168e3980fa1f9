"""Sharding: the mesh of devices, and which arrays are split over which of its axes.

There is one mesh with three axes, any of which may have length 1:

- ``data``: each row of devices takes its share of a batch;
- ``fsdp``: the same, and each row holds only its share of every parameter (ZeRO-3, Rajbhandari et
  al., arXiv:1910.02054), which XLA gathers layer by layer where it is used;
- ``model``: the matrix products of the dense layers are split (Shoeybi et al., arXiv:1909.08053).

All other code works on whole arrays: norms, G, eta and BatchNorm's averages are those of the whole
arrays, and XLA inserts the communication.
"""

import dataclasses
import math
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from training.config import MESH_AXES, TrainConfig
from training.errors import ConfigError
from training.state import TrainState

DATA, FSDP, MODEL = MESH_AXES

T = TypeVar("T")


def make_mesh(config: TrainConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes the mesh that the config asks for; by default, all devices on ``data``.

    Args:
      config: the resolved config of the run.
      devices: the devices of the mesh; by default, all devices of the platform.

    Raises:
      ConfigError: if there are no such devices, if their number is not that of the mesh, or if a
        batch cannot be split evenly over them.
    """
    if devices is None:
        devices = find_devices(config.platform)
    sizes = dict.fromkeys(MESH_AXES, 1) | (config.mesh_axes or {DATA: len(devices)})
    if math.prod(sizes.values()) != len(devices):
        raise ConfigError(
            f"--mesh {config.mesh}: takes {math.prod(sizes.values())} devices; make the product of "
            f"the sizes {len(devices)}, as many as there are"
        )
    for flag in ("train_bs", "test_bs"):
        _check_divides(flag, getattr(config, flag), sizes[DATA] * sizes[FSDP])
    shape, axis_types = tuple(sizes.values()), (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(shape, MESH_AXES, axis_types, devices=devices)


def use_platform(platform: str | None) -> None:
    """Makes JAX use one kind of device. Call this before JAX looks for devices."""
    if platform:
        jax.config.update("jax_platforms", _gpu() if platform == "gpu" else platform)


def _gpu() -> str:
    """Returns JAX's name for the kind of GPU that it has a plugin for."""
    plugins = " ".join(plugin.name for plugin in entry_points(group="jax_plugins"))
    # Not both, as JAX raises an error for each named kind that is not installed.
    return "rocm" if "rocm" in plugins else "cuda"


def find_devices(platform: str | None) -> list[jax.Device]:
    """Returns the devices that JAX uses, including those of other processes.

    Args:
      platform: the value of the flag, already passed to :func:`use_platform`.

    Raises:
      ConfigError: if there are none.
    """
    try:
        return jax.devices()
    except Exception as error:  # JAX raises several types for a missing device.
        config: Any = jax.config  # Its flags are declared at run time.
        flag = f"--platform {platform}" if platform else f"JAX_PLATFORMS={config.jax_platforms}"
        # JAX's hint about its own variable would mislead a user who gave the flag.
        reason = str(error).split(" (set JAX_PLATFORMS")[0].partition("\n")[0]
        raise ConfigError(
            f"{flag}: JAX finds no such device; leave it out, or install the JAX that has it, with "
            "`./run install cuda13`, or `tpu`" + (f" ({reason})" if reason else "")
        ) from error


def _check_divides(flag: str, batch_size: int, shares: int) -> None:
    if batch_size % shares:
        below = batch_size // shares * shares
        near = f"{below} or {below + shares}" if below else str(shares)
        raise ConfigError(
            f"--{flag} {batch_size}: not a multiple of the {shares} devices that share a batch; "
            f"{near} would be"
        )


def place(mesh: Mesh, state: TrainState) -> TrainState:
    """Returns the shapes of a state, each with its sharding from :func:`of_state`."""
    with_sharding = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    shapes: TrainState = jax.tree.map(with_sharding, state, of_state(mesh, state))
    return shapes


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that puts the whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def copy(tree: T) -> T:
    """Copies arrays on the devices, so that the originals can be donated."""
    shardings = jax.tree.map(lambda x: x.sharding, tree)
    copies: T = jax.jit(lambda x: jax.tree.map(jnp.copy, x), out_shardings=shardings)(tree)
    return copies


def over_batch(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that splits the first axis over the devices that share a batch."""
    return NamedSharding(mesh, PartitionSpec((DATA, FSDP)))


def of_state(mesh: Mesh, state: TrainState) -> TrainState:
    """Returns the shardings of a state: parameters split by rule, the rest whole on every device.

    What the optimiser keeps of each parameter, as its momentum, is split as the parameter is.

    Args:
      mesh: a mesh from :func:`make_mesh`.
      state: the state, or its shapes.

    Returns:
      The same tree, with shardings for leaves.
    """
    leaves, found = jax.tree.flatten(state.params)
    structure: Any = found  # Its operators have no types.
    dense, shardings = 0, []
    for leaf in leaves:
        shardings.append(NamedSharding(mesh, _partition(mesh, leaf.shape, dense)))
        dense += len(leaf.shape) == 2
    everywhere = replicated(mesh)
    split: TrainState = jax.tree.map(lambda _: everywhere, state)
    params = jax.tree.unflatten(structure, shardings)

    def of_params(tree: Any) -> bool:
        return bool(jax.tree.structure(tree) == structure)

    opt_state = jax.tree.map(
        lambda tree: params if of_params(tree) else everywhere, state.opt_state, is_leaf=of_params
    )
    return dataclasses.replace(split, params=params, opt_state=opt_state)


def _partition(mesh: Mesh, shape: tuple[int, ...], dense: int) -> PartitionSpec:
    """Returns the partition of a parameter; ``dense`` is the number of dense layers before it."""
    axes: list[str | None] = [None] * len(shape)

    def place(name: str, candidates: Sequence[int]) -> None:
        """Gives the mesh axis ``name`` the first free candidate that its size divides."""
        size = mesh.shape[name]
        fitting = (i for i in candidates if axes[i] is None and shape[i] % size == 0)
        if size > 1 and (axis := next(fitting, None)) is not None:
            axes[axis] = name

    if len(shape) == 2:
        # Outputs and inputs in turn, so that each layer takes its input split as the last left it.
        place(MODEL, (1, 0) if dense % 2 == 0 else (0, 1))
    place(FSDP, sorted(range(len(shape)), key=lambda i: shape[i], reverse=True))
    return PartitionSpec(*axes)
