"""The two losses, one number for each example."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax


def mse(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over the classes of ``(logits - sqrt(num_classes) * onehot(labels))**2``.

    Args:
      logits: ``(batch, num_classes)``.
      labels: ``(batch,)`` integers.

    Returns:
      ``(batch,)``, in the dtype of the logits.
    """
    num_classes = logits.shape[-1]
    target = math.sqrt(num_classes) * jax.nn.one_hot(labels, num_classes, dtype=logits.dtype)
    return jnp.mean(jnp.square(logits - target), axis=-1)


LOSSES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "mse": mse,
    "xent": optax.softmax_cross_entropy_with_integer_labels,
}
