"""The layers of the convolutional networks."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.cpu_convolution import convolve


class BatchNorm(nnx.BatchNorm):
    """Batch normalisation without scale and offset.

    Running averages keep 0.9 of their previous value. The running variance averages unbiased
    estimates: ``n / (n - 1)`` times the variance of a batch of ``n`` values. Statistics are
    computed and kept in ``param_dtype``. Results have ``dtype``.
    """

    def __init__(
        self,
        num_features: int,
        *,
        dtype: jax.typing.DTypeLike,
        param_dtype: jax.typing.DTypeLike,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            num_features,
            momentum=0.9,
            epsilon=1e-5,
            dtype=param_dtype,
            use_bias=False,
            use_scale=False,
            rngs=rngs,
        )
        # Flax keeps the averages in float32, whatever dtype it computes in.
        self.mean = nnx.BatchStat(jnp.zeros(num_features, param_dtype))
        self.var = nnx.BatchStat(jnp.ones(num_features, param_dtype))
        self.result_dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
        """Normalises the last axis of ``x``, by the batch or, after ``eval()``, by the averages."""
        kept = self.momentum * self.var[...]
        normalised: jax.Array = super().__call__(x).astype(self.result_dtype)
        if not self.use_running_average:
            n = x.size // self.num_features
            self.var[...] = kept + (self.var[...] - kept) * (n / max(n - 1, 1))
        return normalised


def conv(
    d_in: int,
    d_out: int,
    size: int,
    stride: int = 1,
    *,
    dtype: jax.typing.DTypeLike,
    param_dtype: jax.typing.DTypeLike,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """Returns a square convolution without bias. Its padding keeps the map's size at stride 1."""
    return nnx.Conv(
        d_in,
        d_out,
        (size, size),
        strides=stride,
        # Equal on all sides. For even maps and stride 2, "SAME" would pad them unequally.
        padding=size // 2,
        use_bias=False,
        dtype=dtype,
        param_dtype=param_dtype,
        conv_general_dilated=_convolve,
        rngs=rngs,
    )


def _convolve(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **_: Any,
) -> jax.Array:
    # Flax also passes dilations and groups. There are none here.
    return convolve(x, kernel, strides, padding)
