"""The networks, by name: Flax NNX modules for NHWC images of any size.

The names are known without importing Flax, so a command line can list them at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    import jax
    from flax import nnx

# Other names of networks.
ALIASES = {"vgg": "vgg16"}

# Each name of --arch, with its module, its class and the options that it fixes.
ARCHITECTURES = {
    "fcn": ("models.fcn", "FCN", {}),
    **{f"vgg{d}": ("models.vgg", "VGG", {"depth": d}) for d in (11, 13, 16, 19)},
    **{f"resnet{d}": ("models.resnet", "ResNet", {"depth": d}) for d in (18, 34, 50, 101, 152)},
    "vit": ("models.vit", "ViT", {}),
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
      **options: options of the network's class: ``depth`` and ``width`` of ``fcn``; of the others
        ``bn_group``, the number of examples that BatchNorm takes together, by default the batch.

    Returns:
      A module that maps images ``(batch, height, width, channels)`` to logits
      ``(batch, num_classes)`` of ``dtype``.
    """
    module, name, fixed = ARCHITECTURES[arch]
    network: Callable[..., nnx.Module] = getattr(importlib.import_module(module), name)
    types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
    return network(image_shape, num_classes, **fixed, **options, **types)
