"""The layers of the convolutional networks."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.cpu_convolution import convolve


class BatchNorm(nnx.BatchNorm):
    """Batch normalisation without scale and offset, of a batch or of each group of a batch.

    Groups are consecutive examples, and each is normalised as if it were a batch. So a device that
    holds whole groups needs nothing of others to normalise them.

    Running averages keep 0.9 of their previous value. The running variance averages unbiased
    estimates: ``n / (n - 1)`` times the variance of a batch of ``n`` values. With groups, both
    averages are the means of what they would be after each group alone. Statistics are computed
    and kept in ``param_dtype``. Results have ``dtype``.
    """

    def __init__(
        self,
        num_features: int,
        *,
        group: int = 0,
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
        # The number of examples in a group, or 0 if the batch is one.
        self.group = group

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
        """Normalises the last axis of ``x``, by groups or, after ``eval()``, by the averages."""
        if self.use_running_average or not self.group:
            return self._normalise(x)
        graphdef, averages = nnx.split(self)

        def of_group(x: jax.Array) -> tuple[jax.Array, nnx.State[Any, Any]]:
            norm = nnx.merge(graphdef, averages, copy=True)
            return norm._normalise(x), nnx.state(norm)

        groups = x.reshape(-1, self.group, *x.shape[1:])
        normalised, averages_after = jax.vmap(of_group)(groups)
        nnx.update(self, jax.tree.map(lambda each: jnp.mean(each, axis=0), averages_after))
        return normalised.reshape(x.shape)

    def _normalise(self, x: jax.Array) -> jax.Array:
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
    use_bias: bool = False,
    dtype: jax.typing.DTypeLike,
    param_dtype: jax.typing.DTypeLike,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """Returns a square convolution. Its padding keeps the map's size at stride 1."""
    return nnx.Conv(
        d_in,
        d_out,
        (size, size),
        strides=stride,
        # Equal on all sides. For even maps and stride 2, "SAME" would pad them unequally.
        padding=size // 2,
        use_bias=use_bias,
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
