"""Tasks on images: CIFAR-10, and scikit-learn's digits for a quick look."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import models
from experiments.tasks import Budget, Data, Task
from input_pipeline import resident
from input_pipeline.batch import normalise
from input_pipeline.specs import SPECS
from models.cpu_convolution import convolve
from models.vit import ViT
from training.step import mse

DATASETS = {"smoke": "digits", "cpu": "cifar10", "gpu": "cifar10"}
VALIDATION_BATCH = 500


def data(dataset: str, limit: int) -> Data:
    """Loads a data set, with up to ``limit`` of its test images for validation."""
    spec, arrays = SPECS[dataset], resident.load(SPECS[dataset])
    limit = min(limit, arrays.test.size) // VALIDATION_BATCH * VALIDATION_BATCH or arrays.test.size
    size = min(VALIDATION_BATCH, limit)

    def chosen(rng: np.random.Generator, steps: int, batch_size: int) -> np.ndarray:
        per_epoch = arrays.train.size // batch_size
        epochs = -(-steps // per_epoch)
        orders = [rng.permutation(arrays.train.size) for _ in range(epochs)]
        rows = [order[: per_epoch * batch_size].reshape(-1, batch_size) for order in orders]
        return np.concatenate(rows)[:steps].astype(np.int32)

    def train(data: Any, chosen: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        split = data["train"]
        if spec.augment:
            images = resident.crop_and_flip(key, split.images, chosen)
        else:
            images = split.images[chosen]
        return normalise(spec, images, jnp.float32), split.labels[chosen]

    def validation(data: Any, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        part = lambda x: jax.lax.dynamic_slice_in_dim(x, index * size, size)
        split = jax.tree.map(part, data["test"])
        return normalise(spec, split.images, jnp.float32), split.labels

    on_device = jax.device_put({"train": arrays.train, "test": arrays.test})
    return Data(on_device, chosen, train, validation, limit // size)


def task(
    name: str,
    budget: Budget,
    network: Callable[..., nnx.Module],
    settings: dict[str, Any],
    *,
    batch_size: int,
    steps: int,
    loss: str,
    validation: int = 2000,
    convolutional: bool = False,
) -> Task:
    """Makes a task of a network whose first arguments are the image's shape and the classes."""
    dataset = DATASETS[budget]
    spec = SPECS[dataset]
    return Task(
        name,
        {**settings, "dataset": dataset, "loss": loss, "validation": validation},
        lambda rngs: network(spec.image_shape, spec.num_classes, rngs=rngs, **settings),
        functools.cache(lambda: data(dataset, validation)),
        {"mse": mse, "xent": optax.softmax_cross_entropy_with_integer_labels}[loss],
        batch_size,
        steps,
        convolutional,
    )


def fcn(
    budget: Budget,
    *,
    depth: int = 8,
    width: int = 256,
    batch_size: int = 128,
    steps: int | None = None,
) -> Task:
    """The paper's fully connected network, with its mean squared error."""
    network = functools.partial(models.create, "fcn", dtype=jnp.float32, param_dtype=jnp.float32)
    steps = steps or {"smoke": 20, "cpu": 3000, "gpu": 15_000}[budget]
    settings = {"depth": depth, "width": width}
    return task("fcn", budget, network, settings, batch_size=batch_size, steps=steps, loss="mse")


class MLP(nnx.Module):
    """Dense layers with biases, each but the last followed by LayerNorm and ReLU."""

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        *,
        depth: int,
        width: int,
        rngs: nnx.Rngs,
    ):
        widths = [math.prod(image_shape)] + [width] * (depth - 1)
        self.layers = nnx.List(nnx.Linear(d_in, width, rngs=rngs) for d_in in widths[: depth - 1])
        self.norms = nnx.List(nnx.LayerNorm(width, rngs=rngs) for _ in self.layers)
        self.head = nnx.Linear(width, num_classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps ``(batch, *image_shape)`` to logits ``(batch, num_classes)``."""
        x = images.reshape(len(images), -1)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = nnx.relu(norm(layer(x)))
        return self.head(x)


def mlp(
    budget: Budget,
    *,
    depth: int = 6,
    width: int = 256,
    batch_size: int = 128,
    steps: int | None = None,
) -> Task:
    """A perceptron with biases and LayerNorm."""
    steps = steps or {"smoke": 20, "cpu": 3000, "gpu": 15_000}[budget]
    settings = {"depth": depth, "width": width}
    return task("mlp", budget, MLP, settings, batch_size=batch_size, steps=steps, loss="xent")


def _convolve(x: Any, kernel: Any, strides: Any, padding: Any, **_: Any) -> jax.Array:
    return convolve(x, kernel, strides, padding)


class CNN(nnx.Module):
    """A narrow pre-activation ResNet of three stages, with biases and affine BatchNorm."""

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        *,
        width: int,
        blocks: int,
        rngs: nnx.Rngs,
    ):
        def conv(d_in: int, d_out: int, size: int = 3, stride: int = 1) -> nnx.Conv:
            return nnx.Conv(
                d_in,
                d_out,
                (size, size),
                strides=stride,
                padding=size // 2,
                conv_general_dilated=_convolve,
                rngs=rngs,
            )

        def norm(width: int) -> nnx.BatchNorm:
            return nnx.BatchNorm(width, momentum=0.9, rngs=rngs)

        self.stem = conv(image_shape[2], width)
        self.blocks: nnx.List[nnx.Dict[Any]] = nnx.List()
        channels = width
        for stage in range(3):
            for i in range(blocks):
                d_out, stride = width << stage, 2 if stage and not i else 1
                self.blocks.append(
                    nnx.Dict(
                        norm1=norm(channels),
                        conv1=conv(channels, d_out, 3, stride),
                        norm2=norm(d_out),
                        conv2=conv(d_out, d_out),
                        shortcut=None
                        if (channels, stride) == (d_out, 1)
                        else conv(channels, d_out, 1, stride),
                    )
                )
                channels = d_out
        self.norm = norm(channels)
        self.head = nnx.Linear(channels, num_classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps ``(batch, *image_shape)`` to logits ``(batch, num_classes)``."""
        x = self.stem(images)
        for block in self.blocks:
            h = nnx.relu(block.norm1(x))
            if block.shortcut is not None:
                x = block.shortcut(h)
            x = x + block.conv2(nnx.relu(block.norm2(block.conv1(h))))
        return self.head(jnp.mean(nnx.relu(self.norm(x)), axis=(1, 2)))


def cnn(
    budget: Budget,
    *,
    width: int = 16,
    blocks: int = 1,
    batch_size: int = 64,
    steps: int | None = None,
) -> Task:
    """A narrow ResNet with biases and affine BatchNorm."""
    steps = steps or {"smoke": 10, "cpu": 600, "gpu": 15_000}[budget]
    settings = {"width": width, "blocks": blocks}
    return task(
        "cnn",
        budget,
        CNN,
        settings,
        batch_size=batch_size,
        steps=steps,
        loss="xent",
        convolutional=True,
    )


def vit(
    budget: Budget,
    *,
    depth: int = 4,
    width: int = 96,
    batch_size: int = 64,
    steps: int | None = None,
) -> Task:
    """A small vision transformer."""
    steps = steps or {"smoke": 10, "cpu": 400, "gpu": 15_000}[budget]
    settings = {"depth": depth, "width": width}
    return task("vit", budget, ViT, settings, batch_size=batch_size, steps=steps, loss="xent")
