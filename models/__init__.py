"""The networks, by name: Flax NNX modules for NHWC images of any size.

The names are known without importing Flax, so a command line can list them at once.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    import jax
    from flax import nnx


@dataclass(frozen=True)
class Architecture:
    """A network that has a name.

    Attributes:
      module: where its class is.
      network: the class.
      fixed: the arguments of the class that the name determines.
      options: the arguments that a user may choose, with their defaults.
      paper: whether plain AGD shares its step out by the number of tensors, as the paper does;
        otherwise by the effective depth.
    """

    module: str
    network: str
    fixed: Mapping[str, int] = field(default_factory=dict)
    options: Mapping[str, int] = field(default_factory=dict)
    paper: bool = False


def _of_depth(module: str, network: str, depth: int) -> Architecture:
    """Returns a network of the paper that has BatchNorm."""
    return Architecture(module, network, {"depth": depth}, {"bn_group": 0}, paper=True)


# Other names of networks.
ALIASES = {"vgg": "vgg16"}

# Each name of --arch.
ARCHITECTURES = {
    "fcn": Architecture("models.fcn", "FCN", options={"depth": 10, "width": 256}, paper=True),
    **{f"vgg{d}": _of_depth("models.vgg", "VGG", d) for d in (11, 13, 16, 19)},
    **{f"resnet{d}": _of_depth("models.resnet", "ResNet", d) for d in (18, 34, 50, 101, 152)},
    "vit": Architecture("models.vit", "ViT"),
}


ARCHITECTURES |= {alias: ARCHITECTURES[name] for alias, name in ALIASES.items()}


def create(
    arch: str,
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    dtype: jax.typing.DTypeLike,
    param_dtype: jax.typing.DTypeLike,
    rngs: nnx.Rngs,
    **options: int,
) -> nnx.Module:
    """Builds a network by name.

    Args:
      arch: a key of :data:`ARCHITECTURES`.
      image_shape: ``(height, width, channels)``.
      num_classes: the width of the last layer.
      dtype: the dtype in which the network computes.
      param_dtype: the dtype of its parameters and running averages.
      rngs: the random keys for Flax's own starting weights.
      **options: some of the network's options: ``depth`` and ``width`` of ``fcn``; ``bn_group``,
        the number of examples that BatchNorm takes together, by default the batch.

    Returns:
      A module that maps images ``(batch, height, width, channels)`` to logits
      ``(batch, num_classes)`` of ``dtype``.
    """
    one = ARCHITECTURES[arch]
    network: Callable[..., nnx.Module] = getattr(importlib.import_module(one.module), one.network)
    types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
    return network(image_shape, num_classes, **one.fixed, **options, **types)
