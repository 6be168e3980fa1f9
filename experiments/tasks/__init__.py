"""The tasks that optimisers are compared on, by name. A new one is a file here and a row below."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

Loss = Callable[[jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True)
class Data:
    """Training and validation data, on the device.

    Attributes:
      arrays: a pytree of arrays, passed to the compiled programs as an argument.
      chosen: ``(rng, steps, batch_size) -> (steps, batch_size)``, the examples of each step.
      train: ``(arrays, chosen, key) -> (inputs, targets)``, a batch for training.
      validation: ``(arrays, index) -> (inputs, targets)``, a batch for validation.
      batches: the number of batches for validation.
    """

    arrays: Any
    chosen: Callable[[np.random.Generator, int, int], np.ndarray]
    train: Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
    validation: Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]]
    batches: int


# Compared by identity: create() makes one of each.
@dataclass(frozen=True, eq=False)
class Task:
    """A network, its data and how long it is trained.

    Attributes:
      name: the name of the task.
      settings: all else that determines it, as JSON values; part of the key of each run.
      network: makes the network, with Flax's own starting weights.
      data: loads the data.
      loss: ``(logits, targets)`` to the loss of each prediction, where targets are class numbers.
      batch_size: examples per step.
      steps: the length of a run.
      loss_scale: a factor of the loss that the optimiser sees, and no record.
      convolutional: whether it has convolutions, which XLA runs on one thread inside of loops on a
        CPU.
    """

    name: str
    settings: dict[str, Any]
    network: Callable[[nnx.Rngs], nnx.Module]
    data: Callable[[], Data]
    loss: Loss
    batch_size: int
    steps: int
    loss_scale: float = 1.0
    convolutional: bool = False


# The modules of this package that make a task: each has a function of the name, which takes the
# settings that a figure changes.
TASKS = {
    "fcn": "images",
    "mlp": "images",
    "cnn": "images",
    "vit": "images",
    "gpt": "text",
    "resnet18": "images",
    "vgg16": "images",
    "resnet50": "images",
}
Budget = Literal["smoke", "cpu", "gpu"]


@functools.cache
def create(name: str, budget: Budget, **changes: Any) -> Task:
    """Makes a task.

    Args:
      name: one of :data:`TASKS`.
      budget: how large it is: ``smoke`` for tests, ``cpu`` for a minute on two cores, or ``gpu``.
      changes: settings that differ from those of the budget.
    """
    module = importlib.import_module(f"experiments.tasks.{TASKS[name]}")
    task: Task = getattr(module, name)(budget, **changes)
    return task
