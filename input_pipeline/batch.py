"""The batches that a step is given, whatever their source."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from input_pipeline.specs import DatasetSpec


class Batch(NamedTuple):
    """Examples, some of which may be padding.

    Attributes:
      images: ``(batch, height, width, channels)``, uint8 or, once normalised, floating.
      labels: ``(batch,)``, int32.
      weights: ``(batch,)``, floating, 1 for an example and 0 for padding.
    """

    images: jax.Array
    labels: jax.Array
    weights: jax.Array


def normalise(spec: DatasetSpec, images: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Maps uint8 images to ``(pixel / 255 - mean) / std``, channel by channel."""
    mean, std = jnp.asarray(spec.mean, dtype), jnp.asarray(spec.std, dtype)
    return (images.astype(dtype) / 255 - mean) / std
