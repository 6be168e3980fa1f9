"""The metrics of training: sums that stay on the device and are rarely fetched."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Metrics(NamedTuple):
    """Sums over examples, as scalars of one floating dtype.

    Attributes:
      examples: the number of examples, without padding.
      loss: the sum of their losses.
      correct: the number of examples that the network classified correctly.
    """

    examples: jax.Array
    loss: jax.Array
    correct: jax.Array


class TrainMetrics(NamedTuple):
    """The metrics of the examples and of the optimiser, as scalars of one floating dtype.

    Attributes:
      sums: the sums over the examples.
      steps: the number of steps, up to and including the first that was not :func:`finite`.
      eta: the sum over the steps of eta, the automatic learning rate.
      eta_min: the smallest eta.
      eta_max: the largest eta.
      eta_last: the eta of the last finite step.
      gradient_summary: the sum over the steps of the gradient summary G.
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
    """Returns the sums over one batch.

    Args:
      losses: the loss of each example, ``(batch,)``.
      logits: the logits, ``(batch, num_classes)``.
      labels: the labels, ``(batch,)`` integers.
      weights: the weights, ``(batch,)``: 1 for an example, 0 for padding.
    """
    hits = (jnp.argmax(logits, axis=-1) == labels).astype(losses.dtype)
    return Metrics(jnp.sum(weights), jnp.sum(weights * losses), jnp.sum(weights * hits))


def zero_metrics(dtype: jax.typing.DTypeLike) -> Metrics:
    """Returns the sums over no examples."""
    return Metrics(*jnp.zeros([3], dtype))


def zero_train_metrics(dtype: jax.typing.DTypeLike) -> TrainMetrics:
    """Returns the sums over no steps."""
    zero, infinity = jnp.zeros([], dtype), jnp.full([], jnp.inf, dtype)
    return TrainMetrics(zero_metrics(dtype), zero, zero, infinity, -infinity, zero, zero)


def add(a: Metrics, b: Metrics) -> Metrics:
    """Returns the metrics of the examples of both."""
    both: Metrics = jax.tree.map(jnp.add, a, b)
    return both


def add_train(a: TrainMetrics, b: TrainMetrics) -> TrainMetrics:
    """Returns the metrics of the steps of both."""
    both: TrainMetrics = jax.tree.map(jnp.add, a, b)
    return both._replace(
        steps=a.steps + jnp.where(finite(a), b.steps, 0),
        eta_min=jnp.minimum(a.eta_min, b.eta_min),
        eta_max=jnp.maximum(a.eta_max, b.eta_max),
        eta_last=jnp.where(finite(both), b.eta_last, a.eta_last),
    )


def finite(metrics: TrainMetrics) -> jax.Array:
    """Returns a boolean scalar: whether no loss and no gradient was infinite or NaN."""
    return jnp.isfinite(metrics.sums.loss) & jnp.isfinite(metrics.gradient_summary)


def averages(metrics: Metrics) -> dict[str, float]:
    """Returns mean loss and accuracy (0 to 1), on the host; NaN if there were no examples."""
    examples, loss, correct = map(float, metrics)
    examples = examples or math.nan
    return {"loss": loss / examples, "accuracy": correct / examples}


def train_averages(metrics: TrainMetrics) -> dict[str, float]:
    """Returns :func:`averages`, mean and range of eta, and mean gradient summary, on the host."""
    steps = float(metrics.steps)
    return averages(metrics.sums) | {
        "eta": float(metrics.eta) / steps,
        "eta_min": float(metrics.eta_min),
        "eta_max": float(metrics.eta_max),
        "gradient_summary": float(metrics.gradient_summary) / steps,
    }
