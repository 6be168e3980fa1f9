"""What the convolutional networks are made of."""

import jax
import jax.numpy as jnp
from flax import nnx

from models.convolution import convolve


class BatchNorm(nnx.BatchNorm):
    """Batch normalisation without scale and offset.

    Running averages keep 0.9 of what they were, and that of the variance is over unbiased
    estimates, ``n / (n - 1)`` times the variance of a batch of ``n`` values. Statistics are
    computed and kept in ``param_dtype``, results have ``dtype``.
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
        # Flax keeps them in float32, whatever it computes in.
        self.mean = nnx.BatchStat(jnp.zeros(num_features, param_dtype))
        self.var = nnx.BatchStat(jnp.ones(num_features, param_dtype))
        self.result_dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last axis of ``x``, by the batch or, after ``eval()``, the averages."""
        kept = self.momentum * self.var[...]
        normalised = super().__call__(x).astype(self.result_dtype)
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
    """A square convolution without bias, zero-padded so that stride 1 keeps the map's size."""
    return nnx.Conv(
        d_in,
        d_out,
        (size, size),
        strides=stride,
        # The same on all sides, also for even maps and stride 2, where "SAME" is lopsided.
        padding=size // 2,
        use_bias=False,
        dtype=dtype,
        param_dtype=param_dtype,
        conv_general_dilated=_convolve,
        rngs=rngs,
    )


def _convolve(x, kernel, strides, padding, **_) -> jax.Array:
    # What else Flax passes are dilations and groups, of which there are none here.
    return convolve(x, kernel, strides, padding)
