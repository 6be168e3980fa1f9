"""Residual networks: pre-activation on small images, post-activation on large ones."""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from models.layers import BatchNorm, conv

# For each depth, whether the blocks are bottlenecks and the number of blocks in each stage.
STAGES = {
    18: (False, (2, 2, 2, 2)),
    34: (False, (3, 4, 6, 3)),
    50: (True, (3, 4, 6, 3)),
    101: (True, (3, 4, 23, 3)),
    152: (True, (3, 8, 36, 3)),
}
EXPANSION = 4
# Images up to this height use the form designed for CIFAR.
LARGEST_SMALL = 32


class PreActivationBlock(nnx.Module):
    """BatchNorm, ReLU and convolution, two (bottleneck: three) times, plus the input.

    Where the shape changes, the shortcut is a 1x1 convolution of the activated input.
    """

    def __init__(
        self, d_in: int, width: int, stride: int, bottleneck: bool, group: int, **types: Any
    ):
        self.convs = _convolutions(d_in, width, stride, bottleneck, types)
        self.norms = nnx.List(BatchNorm(c.in_features, group=group, **types) for c in self.convs)
        self.shortcut = _shortcut(d_in, self.convs[-1].out_features, stride, types)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``(batch, height, width, d_in)`` to ``(batch, height', width', d_out)``."""
        h = nnx.relu(self.norms[0](x))
        if self.shortcut is not None:
            x = self.shortcut(h)
        h = self.convs[0](h)
        for norm, convolve in zip(self.norms[1:], self.convs[1:], strict=True):
            h = convolve(nnx.relu(norm(h)))
        return h + x


class PostActivationBlock(nnx.Module):
    """Convolution and BatchNorm, two (bottleneck: three) times, plus the input.

    There is a ReLU after each BatchNorm but the last, and one after the sum.

    Where the shape changes, the shortcut is a 1x1 convolution with BatchNorm.
    """

    def __init__(
        self, d_in: int, width: int, stride: int, bottleneck: bool, group: int, **types: Any
    ):
        self.convs = _convolutions(d_in, width, stride, bottleneck, types)
        self.norms = nnx.List(BatchNorm(c.out_features, group=group, **types) for c in self.convs)
        d_out = self.convs[-1].out_features
        self.shortcut = _shortcut(d_in, d_out, stride, types)
        norm = None if self.shortcut is None else BatchNorm(d_out, group=group, **types)
        self.shortcut_norm = norm

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``(batch, height, width, d_in)`` to ``(batch, height', width', d_out)``."""
        h = self.norms[0](self.convs[0](x))
        for norm, convolve in zip(self.norms[1:], self.convs[1:], strict=True):
            h = norm(convolve(nnx.relu(h)))
        if self.shortcut is not None and self.shortcut_norm is not None:
            x = self.shortcut_norm(self.shortcut(x))
        return nnx.relu(h + x)


Block: TypeAlias = PreActivationBlock | PostActivationBlock


def _convolutions(
    d_in: int, width: int, stride: int, bottleneck: bool, types: dict[str, Any]
) -> nnx.List[nnx.Conv]:
    if not bottleneck:
        return nnx.List([conv(d_in, width, 3, stride, **types), conv(width, width, 3, **types)])
    return nnx.List(
        [
            conv(d_in, width, 1, **types),
            conv(width, width, 3, stride, **types),
            conv(width, EXPANSION * width, 1, **types),
        ]
    )


def _shortcut(d_in: int, d_out: int, stride: int, types: dict[str, Any]) -> nnx.Conv | None:
    return None if (d_in, stride) == (d_out, 1) else conv(d_in, d_out, 1, stride, **types)


class ResNet(nnx.Module):
    """A stem, four stages of residual blocks, the mean over the map and one dense layer.

    On images of up to 32 pixels the stem is one 3x3 convolution, neither normalised nor
    activated, and the blocks are pre-activation. On larger ones it is a 7x7 convolution of
    stride 2 with BatchNorm, ReLU and a 3x3 max-pool of stride 2, and the blocks are
    post-activation, with their stride in the 3x3 convolution ("v1.5").
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        *,
        depth: int = 18,
        width: int = 64,
        bn_group: int = 0,
        dtype: jax.typing.DTypeLike = jnp.float32,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        bottleneck, stages = STAGES[depth]
        height, _, channels = image_shape
        block: type[Block]
        self.stem_norm: BatchNorm | None
        if height <= LARGEST_SMALL:
            block, self.stem_norm = PreActivationBlock, None
            self.stem = conv(channels, width, 3, **types)
        else:
            block, self.stem_norm = PostActivationBlock, BatchNorm(width, group=bn_group, **types)
            self.stem = conv(channels, width, 7, 2, **types)
        self.blocks: nnx.List[Block] = nnx.List()
        channels = width
        for stage, count in enumerate(stages):
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                sizes = channels, width << stage, stride
                self.blocks.append(block(*sizes, bottleneck, bn_group, **types))
                channels = self.blocks[-1].convs[-1].out_features
        self.head = nnx.Linear(channels, num_classes, use_bias=False, **types)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps ``(batch, *image_shape)`` to logits ``(batch, num_classes)``."""
        x = self.stem(images)
        if self.stem_norm is not None:
            x = nnx.relu(self.stem_norm(x))
            x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(x, axis=(1, 2)))
