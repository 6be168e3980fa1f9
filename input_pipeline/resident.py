"""Small data sets: the whole set on the device as uint8, batches made inside jit.

Nothing here touches the host: shuffling, augmentation and normalisation are traced into the
compiled training program, so that one dispatch can run any number of steps.
"""

import jax
import jax.numpy as jnp

from input_pipeline.batch import Batch, normalise
from input_pipeline.sources import Split
from input_pipeline.specs import DatasetSpec

PADDING = 4


def epoch_order(key: jax.Array, epoch: jax.typing.ArrayLike, size: int) -> jax.Array:
    """The order in which an epoch visits the examples: a permutation of ``range(size)``."""
    return jax.random.permutation(jax.random.fold_in(key, epoch), size)


def train_batch(
    spec: DatasetSpec,
    split: Split,
    order: jax.Array,
    index: jax.typing.ArrayLike,
    key: jax.Array,
    batch_size: int,
    dtype: jax.typing.DTypeLike,
) -> Batch:
    """Batch number ``index`` of an epoch.

    Args:
      spec: the data set.
      split: its training split, on the device.
      order: of this epoch, from :func:`epoch_order`.
      index: which batch, in ``range(len(order) // batch_size)``.
      key: for the augmentation of this batch.
      batch_size: number of examples; static.
      dtype: of the pictures.
    """
    chosen = jax.lax.dynamic_slice_in_dim(order, index * batch_size, batch_size)
    images = crop_and_flip(key, split.images, chosen) if spec.augment else split.images[chosen]
    return Batch(normalise(spec, images, dtype), split.labels[chosen], jnp.ones(batch_size, dtype))


def eval_batch(
    spec: DatasetSpec,
    split: Split,
    index: jax.typing.ArrayLike,
    batch_size: int,
    dtype: jax.typing.DTypeLike,
) -> Batch:
    """Batch number ``index`` in the order of the file; past the end, padding of weight zero."""
    positions = index * batch_size + jnp.arange(batch_size)
    chosen = jnp.minimum(positions, len(split.labels) - 1)
    images = normalise(spec, split.images[chosen], dtype)
    return Batch(images, split.labels[chosen], (positions < len(split.labels)).astype(dtype))


def crop_and_flip(key: jax.Array, images: jax.Array, chosen: jax.Array) -> jax.Array:
    """Pads with 4 zeros on every side, crops each picture at random, flips every second or so.

    Args:
      key: a random key.
      images: ``(n, height, width, channels)``, of any dtype.
      chosen: ``(batch,)``, which of them to take.

    Returns:
      ``(batch, height, width, channels)``. Each of the 9 x 9 crops is equally likely, and flips
      are fair.
    """
    _, height, width, channels = images.shape
    crop_key, flip_key = jax.random.split(key)
    shifts = jax.random.randint(crop_key, (len(chosen), 2), -PADDING, PADDING + 1)
    flips = jax.random.bernoulli(flip_key, shape=(len(chosen), 1))
    rows = jnp.arange(height) + shifts[:, :1]
    columns = jnp.where(flips, jnp.arange(width)[::-1], jnp.arange(width)) + shifts[:, 1:]
    rows, columns = rows[:, :, None], columns[:, None, :]
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    # One gather of whole pixels from all pictures in one long row. On a CPU, choosing pictures,
    # slicing them and choosing between them and their mirror images cost five times as much.
    pixels = (chosen[:, None, None] * height + rows) * width + columns
    gathered = images.reshape(-1, channels)[jnp.where(inside, pixels, 0)]
    return jnp.where(inside[..., None], gathered, 0)
