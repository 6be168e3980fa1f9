"""What training measures: sums that stay on the device and are fetched rarely."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Metrics(NamedTuple):
    """Sums over examples, as scalars of one floating dtype.

    Attributes:
      examples: how many there were, padding left out.
      loss: sum of their losses.
      correct: how many of them the network put into the right class.
    """

    examples: jax.Array
    loss: jax.Array
    correct: jax.Array


class TrainMetrics(NamedTuple):
    """The same, and what the optimiser did, as scalars of one floating dtype.

    Attributes:
      sums: over the examples.
      steps: how many there were, up to the first that was not :func:`finite`.
      eta: sum over the steps of the automatic learning rate.
      eta_min: the smallest.
      eta_max: the largest.
      eta_last: that of the last step that was finite.
      gradient_summary: sum over the steps of G.
    """

    sums: Metrics
    steps: jax.Array
    eta: jax.Array
    eta_min: jax.Array
    eta_max: jax.Array
    eta_last: jax.Array
    gradient_summary: jax.Array


def of_batch(
    losses: jax.Array, logits: jax.Array, labels: jax.Array, weights: jax.Array
) -> Metrics:
    """Sums over one batch.

    Args:
      losses: ``(batch,)``, one for each example.
      logits: ``(batch, num_classes)``.
      labels: ``(batch,)`` integers.
      weights: ``(batch,)``, 1 for an example and 0 for padding.
    """
    hits = (jnp.argmax(logits, axis=-1) == labels).astype(losses.dtype)
    return Metrics(jnp.sum(weights), jnp.sum(weights * losses), jnp.sum(weights * hits))


def zero_metrics(dtype: jax.typing.DTypeLike) -> Metrics:
    """The sums over no example."""
    return Metrics(*jnp.zeros([3], dtype))


def zero_train_metrics(dtype: jax.typing.DTypeLike) -> TrainMetrics:
    """The sums over no step."""
    zero, infinity = jnp.zeros([], dtype), jnp.full([], jnp.inf, dtype)
    return TrainMetrics(zero_metrics(dtype), zero, zero, infinity, -infinity, zero, zero)


def add(a: Metrics, b: Metrics) -> Metrics:
    """Metrics of the examples of both."""
    both: Metrics = jax.tree.map(jnp.add, a, b)
    return both


def add_train(a: TrainMetrics, b: TrainMetrics) -> TrainMetrics:
    """Metrics of the steps of both."""
    both: TrainMetrics = jax.tree.map(jnp.add, a, b)
    return both._replace(
        steps=a.steps + jnp.where(finite(a), b.steps, 0),
        eta_min=jnp.minimum(a.eta_min, b.eta_min),
        eta_max=jnp.maximum(a.eta_max, b.eta_max),
        eta_last=jnp.where(finite(both), b.eta_last, a.eta_last),
    )


def finite(metrics: TrainMetrics) -> jax.Array:
    """Whether no loss and no gradient has been infinite or not a number, a boolean scalar."""
    return jnp.isfinite(metrics.sums.loss) & jnp.isfinite(metrics.gradient_summary)


def averages(metrics: Metrics) -> dict[str, float]:
    """Mean loss and accuracy (0 to 1), on the host; not a number if there was no example."""
    examples, loss, correct = map(float, metrics)
    examples = examples or math.nan
    return {"loss": loss / examples, "accuracy": correct / examples}


def train_averages(metrics: TrainMetrics) -> dict[str, float]:
    """The same with the mean and the range of eta and the mean gradient summary, on the host."""
    steps = float(metrics.steps)
    return averages(metrics.sums) | {
        "eta": float(metrics.eta) / steps,
        "eta_min": float(metrics.eta_min),
        "eta_max": float(metrics.eta_max),
        "gradient_summary": float(metrics.gradient_summary) / steps,
    }
