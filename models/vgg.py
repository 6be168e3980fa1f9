"""VGG with batch normalisation and one dense layer."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.layers import BatchNorm, conv

# For each depth, the number of convolutions of each width.
REPEATS = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
WIDTHS = (64, 128, 256, 512, 512)
# Five poolings reduce an image of this size to one pixel.
SMALLEST = 32


class VGG(nnx.Module):
    """3x3 convolutions, each with BatchNorm and ReLU, five 2x2 max-pools, one dense layer.

    Images smaller than 32x32 are padded evenly to that size, since their maps would vanish before
    the last pooling. The padding is zero, the mean of the normalised data.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        *,
        depth: int = 16,
        bn_group: int = 0,
        dtype: jax.typing.DTypeLike = jnp.float32,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        height, width, channels = image_shape
        self.padding = (_padding(height), _padding(width))
        self.convs: nnx.List[nnx.List[nnx.Conv]] = nnx.List()
        self.norms: nnx.List[nnx.List[BatchNorm]] = nnx.List()
        for repeats, d_out in zip(REPEATS[depth], WIDTHS, strict=True):
            self.convs.append(nnx.List())
            self.norms.append(nnx.List())
            for _ in range(repeats):
                self.convs[-1].append(conv(channels, d_out, 3, **types))
                self.norms[-1].append(BatchNorm(d_out, group=bn_group, **types))
                channels = d_out
        pixels = (max(height, SMALLEST) // SMALLEST) * (max(width, SMALLEST) // SMALLEST)
        self.head = nnx.Linear(pixels * channels, num_classes, use_bias=False, **types)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps ``(batch, *image_shape)`` to logits ``(batch, num_classes)``."""
        x = jnp.pad(images, ((0, 0), *self.padding, (0, 0)))
        for convs, norms in zip(self.convs, self.norms, strict=True):
            for convolve, norm in zip(convs, norms, strict=True):
                x = nnx.relu(norm(convolve(x)))
            x = nnx.max_pool(x, (2, 2), strides=(2, 2))
        return self.head(x.reshape(len(x), -1))


def _padding(size: int) -> tuple[int, int]:
    missing = max(SMALLEST - size, 0)
    return missing // 2, missing - missing // 2
