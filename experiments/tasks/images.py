"""Tasks on images: CIFAR-10, and scikit-learn's digits for a quick look."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.tasks import Budget, Data, Task
from input_pipeline import folders, imagenet, resident
from input_pipeline.batch import normalise
from input_pipeline.specs import SPECS, DatasetSpec
from models import create
from models.fcn import FCN
from models.layers import conv
from models.vit import ViT
from training.step import LOSSES

VALIDATION_IMAGES, VALIDATION_BATCH = 2000, 500
# Of ImageNet's images, so that a GPU holds all of them: 16 GB.
IMAGENET_SIDE = 64


def spec_of(dataset: str) -> DatasetSpec:
    """Returns the properties of a data set, as it is used here."""
    spec = SPECS[dataset]
    if spec.loader != "imagenet":
        return spec
    return dataclasses.replace(spec, image_shape=(IMAGENET_SIDE, IMAGENET_SIDE, 3))


@functools.cache
def data(dataset: str, validation_images: int, label_noise: float = 0.0) -> Data:
    """Loads a data set.

    Args:
      dataset: its name.
      validation_images: how many of its test images are used, if it has them.
      label_noise: the part of training labels that are drawn anew, from all classes.
    """
    spec = spec_of(dataset)
    if spec.loader == "imagenet":
        arrays = folders.decoded(spec, imagenet.find(spec))
    else:
        arrays = resident.load(spec)
    rng = np.random.default_rng(0)
    drawn = rng.integers(spec.num_classes, size=arrays.train.size, dtype=np.int32)
    wrong = rng.random(arrays.train.size) < label_noise
    labels = np.where(wrong, drawn, arrays.train.labels)
    arrays = arrays._replace(train=arrays.train._replace(labels=labels))
    limit = min(validation_images, arrays.test.size)
    limit = limit // VALIDATION_BATCH * VALIDATION_BATCH or arrays.test.size
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
    network: Callable[..., nnx.Module],
    loss: str,
    *,
    batch_size: int,
    lengths: dict[Budget, int],
    dataset: str = "cifar10",
    convolutional: bool = False,
    **defaults: Any,
) -> Callable[..., Task]:
    """Returns a function that makes a task, ``(budget, **changes) -> Task``.

    Args:
      name: the name of the task.
      network: a class whose first arguments are the image's shape and the number of classes.
      loss: one of :data:`training.step.LOSSES`.
      batch_size: examples per step, unless changed.
      lengths: the steps of a run for each budget, unless changed.
      dataset: the images; those of a ``smoke`` run are always the digits.
      convolutional: whether the network has convolutions.
      defaults: the other arguments of the network, unless changed.
    """

    def make(
        budget: Budget,
        *,
        batch_size: int = batch_size,
        steps: int | None = None,
        loss: str = loss,
        validation: int = VALIDATION_IMAGES,
        label_noise: float = 0.0,
        loss_scale: float = 1.0,
        **changes: Any,
    ) -> Task:
        images, settings = "digits" if budget == "smoke" else dataset, defaults | changes
        spec = spec_of(images)
        # As far as they are unusual, so that other runs keep their keys.
        unusual: dict[str, Any] = {"label_noise": label_noise} if label_noise else {}
        unusual |= {"loss_scale": loss_scale} if loss_scale != 1 else {}
        unusual |= {"image_size": IMAGENET_SIDE} if images == "imagenet" else {}
        return Task(
            name,
            {**settings, **unusual, "dataset": images, "loss": loss, "validation": validation},
            lambda rngs: network(spec.image_shape, spec.num_classes, rngs=rngs, **settings),
            lambda: data(images, validation, label_noise),
            LOSSES[loss],
            batch_size,
            steps or lengths[budget],
            loss_scale,
            convolutional,
        )

    return make


class MLP(nnx.Module):
    """Dense layers with biases, each but the last followed by LayerNorm and ReLU."""

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        *,
        depth: int,
        width: int,
        dtype: str | None = None,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        widths = [math.prod(image_shape)] + [width] * (depth - 1)
        self.layers = nnx.List(nnx.Linear(d_in, width, **options) for d_in in widths[: depth - 1])
        self.norms = nnx.List(nnx.LayerNorm(width, **options) for _ in self.layers)
        self.head = nnx.Linear(width, num_classes, **options)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps ``(batch, *image_shape)`` to logits ``(batch, num_classes)``."""
        x = images.reshape(len(images), -1)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = nnx.relu(norm(layer(x)))
        return self.head(x)


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
        types: dict[str, Any] = {"dtype": jnp.float32, "param_dtype": jnp.float32, "rngs": rngs}

        def convolution(d_in: int, d_out: int, size: int, stride: int = 1) -> nnx.Conv:
            return conv(d_in, d_out, size, stride, use_bias=True, **types)

        def norm(width: int) -> nnx.BatchNorm:
            return nnx.BatchNorm(width, momentum=0.9, rngs=rngs)

        self.stem = convolution(image_shape[2], width, 3)
        self.blocks: nnx.List[nnx.Dict[Any]] = nnx.List()
        channels = width
        for stage in range(3):
            for i in range(blocks):
                d_out, stride = width << stage, 2 if stage and not i else 1
                self.blocks.append(
                    nnx.Dict(
                        norm1=norm(channels),
                        conv1=convolution(channels, d_out, 3, stride),
                        norm2=norm(d_out),
                        conv2=convolution(d_out, d_out, 3),
                        shortcut=None
                        if (channels, stride) == (d_out, 1)
                        else convolution(channels, d_out, 1, stride),
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


def paper_network(
    name: str,
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    rngs: nnx.Rngs,
    dtype: str = "float32",
    **options: Any,
) -> nnx.Module:
    """Returns a network of the paper, which computes in a dtype."""
    options |= {"dtype": jnp.dtype(dtype), "param_dtype": jnp.float32}
    return create(name, image_shape, num_classes, rngs=rngs, **options)


# The paper's fully connected network, with its mean squared error.
fcn = task(
    "fcn",
    FCN,
    "mse",
    batch_size=128,
    lengths={"smoke": 20, "cpu": 3000, "gpu": 15_000},
    depth=8,
    width=256,
)
mlp = task(
    "mlp",
    MLP,
    "xent",
    batch_size=128,
    lengths={"smoke": 20, "cpu": 3000, "gpu": 15_000},
    depth=6,
    width=256,
)
cnn = task(
    "cnn",
    CNN,
    "xent",
    batch_size=64,
    lengths={"smoke": 10, "cpu": 600, "gpu": 15_000},
    convolutional=True,
    width=16,
    blocks=1,
)
vit = task(
    "vit",
    ViT,
    "xent",
    batch_size=64,
    lengths={"smoke": 10, "cpu": 400, "gpu": 15_000},
    depth=4,
    width=96,
)
# The paper's convolutional networks. Its ImageNet is of 224 pixels.
resnet18, vgg16, resnet50 = (
    task(
        name,
        functools.partial(paper_network, name),
        loss,
        batch_size=batch_size,
        lengths={"smoke": 2, "cpu": 390, "gpu": steps},
        dataset=dataset,
        convolutional=True,
    )
    for name, dataset, loss, batch_size, steps in (
        ("resnet18", "cifar10", "mse", 128, 78_000),
        ("vgg16", "cifar100", "mse", 128, 78_000),
        ("resnet50", "imagenet", "xent", 1024, 112_500),
    )
)
