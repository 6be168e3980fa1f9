"""A training step and an evaluation step: pure functions of the state and a batch."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from input_pipeline.batch import Batch
from training import metrics
from training.metrics import Metrics, TrainMetrics
from training.state import Arrays, Graph, Model, TrainState

# (logits, labels) -> the loss of each example.
Loss = Callable[[jax.Array, jax.Array], jax.Array]


def train_step(
    graphdef: Graph,
    tx: optax.GradientTransformation,
    loss: Loss,
    state: TrainState,
    batch: Batch,
) -> tuple[TrainState, TrainMetrics]:
    """Takes one step on a batch. The first three arguments are static.

    Args:
      graphdef: the static part of the network.
      tx: the optimiser, whose state must contain an ``eta`` and a ``gradient_summary``.
      loss: one of :data:`LOSSES`.
      state: the state before the step.
      batch: the training examples. An example of weight zero affects only BatchNorm.

    Returns:
      The state after the step, and the metrics of the batch before the step.
    """

    def objective(params: Arrays) -> tuple[jax.Array, tuple[jax.Array, jax.Array, Arrays]]:
        model = nnx.merge(graphdef, params, state.batch_stats, copy=True)
        model.train()
        logits, losses = _losses(model, loss, batch)
        mean = jnp.mean(batch.weights * losses)
        return mean, (logits, losses, nnx.state(model, nnx.BatchStat))

    gradient = jax.grad(objective, has_aux=True)
    grads, (logits, losses, batch_stats) = gradient(state.params)
    # After the backward pass, which would else wait until devices have summed the weights.
    factor = batch.weights.size / jnp.maximum(1, jnp.sum(batch.weights))
    grads = jax.tree.map(lambda g: factor * g, grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)

    eta: jax.Array = optax.tree.get(opt_state, "eta")
    gradient_summary: jax.Array = optax.tree.get(opt_state, "gradient_summary")
    sums = metrics.of_batch(losses, logits, batch.labels, batch.weights)
    steps = jnp.ones([], eta.dtype)
    measured = TrainMetrics(sums, steps, eta, eta, eta, eta, gradient_summary)
    return TrainState(state.step + 1, params, batch_stats, opt_state), measured


def eval_step(graphdef: Graph, loss: Loss, arrays: Model, batch: Batch) -> Metrics:
    """Returns the metrics of a batch, padded or not. The first two arguments are static."""
    model = nnx.merge(graphdef, arrays["params"], arrays["batch_stats"], copy=True)
    model.eval()
    logits, losses = _losses(model, loss, batch)
    return metrics.of_batch(losses, logits, batch.labels, batch.weights)


def statistics_step(
    graphdef: Graph, params: Arrays, mean: Arrays, batch: Batch, number: jax.Array
) -> Arrays:
    """Adds a batch to the mean of BatchNorm's statistics over several batches.

    Args:
      graphdef: the static part of the network; static.
      params: the parameters whose statistics are taken.
      mean: the mean over the batches before this one; for the first, any arrays of its shapes.
      batch: the examples.
      number: the number of this batch, counted from 1.

    Returns:
      The mean over all batches up to this one, in place of the network's running averages.
    """
    model = nnx.merge(graphdef, params, mean, copy=True)
    model.train()
    # Running averages that keep nothing of their previous value are the statistics of the batch.
    model.set_attributes(nnx.BatchNorm, momentum=0.0, raise_if_not_found=False)
    model(batch.images)
    statistics = nnx.state(model, nnx.BatchStat)
    total: Arrays = jax.tree.map(lambda m, s: m + (s - m) / number, mean, statistics)
    return total


def _losses(model: nnx.Module, loss: Loss, batch: Batch) -> tuple[jax.Array, jax.Array]:
    # The loss is computed in the dtype of the images, whatever dtype the network computes in.
    logits = model(batch.images).astype(batch.images.dtype)
    return logits, loss(logits, batch.labels)


def mse(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the mean over the classes of ``(logits - sqrt(num_classes) * onehot(labels))**2``.

    Args:
      logits: the logits, ``(batch, num_classes)``.
      labels: the labels, ``(batch,)`` integers.

    Returns:
      The loss of each example, ``(batch,)``, in the dtype of the logits.
    """
    num_classes = logits.shape[-1]
    target = math.sqrt(num_classes) * jax.nn.one_hot(labels, num_classes, dtype=logits.dtype)
    return jnp.mean(jnp.square(logits - target), axis=-1)


LOSSES: dict[str, Loss] = {
    "mse": mse,
    "xent": optax.softmax_cross_entropy_with_integer_labels,
}
