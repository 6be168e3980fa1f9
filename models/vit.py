"""A vision transformer."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.transformer import Block

# Images up to this height are cut into patches of 4 x 4 pixels, larger ones into 16 x 16.
LARGEST_SMALL = 64


class ViT(nnx.Module):
    """Embeds square patches and their positions, applies ``depth`` blocks, and takes the mean."""

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        *,
        depth: int = 4,
        width: int = 96,
        heads: int = 4,
        dtype: jax.typing.DTypeLike = jnp.float32,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        height, image_width, channels = image_shape
        self.patch = 4 if height <= LARGEST_SMALL else 16
        patches = (height // self.patch) * (image_width // self.patch)
        self.embed = nnx.Linear(self.patch**2 * channels, width, **types)
        start = nnx.initializers.normal(0.02)
        self.positions = nnx.Embed(patches, width, embedding_init=start, **types)
        self.blocks = nnx.List(Block(width, heads, causal=False, **types) for _ in range(depth))
        self.norm = nnx.LayerNorm(width, **types)
        self.head = nnx.Linear(width, num_classes, use_bias=False, **types)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps ``(batch, *image_shape)`` to logits ``(batch, num_classes)``."""
        batch, height, width, channels = images.shape
        rows, columns = height // self.patch, width // self.patch
        # What does not fill a patch is left out.
        x = images[:, : rows * self.patch, : columns * self.patch]
        x = x.reshape(batch, rows, self.patch, columns, self.patch, channels)
        x = x.swapaxes(2, 3).reshape(batch, rows * columns, -1)
        x = self.embed(x) + self.positions(jnp.arange(rows * columns))
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(self.norm(x), axis=1))
