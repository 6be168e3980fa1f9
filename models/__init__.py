"""The networks, by name: Flax NNX modules without biases, for NHWC pictures.

The names are known without importing Flax, so that a command line can list them at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jax
    from flax import nnx

# --arch -> (module, class).
ARCHITECTURES = {
    "fcn": ("models.fcn", "FCN"),
}


def create(
    arch: str,
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    depth: int,
    width: int,
    dtype: jax.typing.DTypeLike,
    param_dtype: jax.typing.DTypeLike,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """Builds a network by name.

    Args:
      arch: a key of :data:`ARCHITECTURES`.
      image_shape: ``(height, width, channels)``.
      num_classes: width of the last layer.
      depth: number of dense layers of ``fcn``.
      width: width of the hidden layers of ``fcn``.
      dtype: in which the network computes.
      param_dtype: of its parameters.
      rngs: for Flax's own starting weights.

    Returns:
      A module that maps pictures ``(batch, height, width, channels)`` to logits
      ``(batch, num_classes)`` of ``dtype``.
    """
    module, name = ARCHITECTURES[arch]
    network = getattr(importlib.import_module(module), name)
    return network(
        image_shape,
        num_classes,
        depth=depth,
        width=width,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )
