"""The fully connected network."""

import itertools
import math

import jax
import jax.numpy as jnp
from flax import nnx


class FCN(nnx.Module):
    """Flattens its input and applies ``depth`` dense layers, with ``sqrt(2) * relu`` in between."""

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        *,
        depth: int = 10,
        width: int = 256,
        dtype: jax.typing.DTypeLike = jnp.float32,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        widths = [math.prod(image_shape)] + [width] * (depth - 1) + [num_classes]
        self.layers = nnx.List(
            nnx.Linear(d_in, d_out, use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
            for d_in, d_out in itertools.pairwise(widths)
        )

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps ``(batch, *image_shape)`` to logits ``(batch, num_classes)``."""
        x = images.reshape(len(images), -1)
        for layer in self.layers[:-1]:
            # A ReLU halves the mean square of a symmetric input; sqrt(2) restores it.
            x = math.sqrt(2) * nnx.relu(layer(x))
        return self.layers[-1](x)
