"""What AGD costs on networks with the parts that its theory leaves out: biases, norms, attention.

    python -m benchmarks.biases_and_norms

Trains a convolutional network with BatchNorm (Flax NNX) and a transformer (Flax Linen) on the
digits, whose rows are its tokens, and prints the training loss at the end for AGD, by the shapes of
parameters and with a geometry, for AGD with Adam for all but the matrices, and for Adam alone. A
loss is the mean cross-entropy of the last 20 batches; the table has its median over the seeds.
"""

import functools
import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from sklearn.datasets import load_digits

import agd_jax

BATCH = 128
LAST = 20
ADAM = 1e-3

# The starting parameters for a key, and the logits of parameters and images.
Task = tuple[Callable[[jax.Array], Any], Callable[[Any, jax.Array], jax.Array]]


@dataclass(frozen=True)
class Options:
    """What to run."""

    steps: int = 200
    """Steps of each run."""
    seeds: int = 3
    """Runs of each kind."""


class ConvNet(nnx.Module):
    """Three convolutions with biases, each with a BatchNorm that has a scale and an offset."""

    def __init__(self, rngs: nnx.Rngs):
        widths = (1, 32, 64, 64)
        pairs = list(itertools.pairwise(widths))
        self.convs = nnx.List([nnx.Conv(a, b, (3, 3), rngs=rngs) for a, b in pairs])
        self.norms = nnx.List([nnx.BatchNorm(b, rngs=rngs) for _, b in pairs])
        self.out = nnx.Linear(widths[-1], 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps ``(batch, 8, 8)`` to logits ``(batch, 10)``."""
        x = images[..., None]
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(conv(x)))
        return self.out(x.mean((1, 2)))


class Transformer(nn.Module):
    """Two blocks, whose tokens are the rows of an image."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps ``(batch, 8, 8)`` to logits ``(batch, 10)``."""
        place = self.param("place", nn.initializers.normal(0.02), (8, 64))
        x = nn.Dense(64)(images) + place
        for _ in range(2):
            x += nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x))
            x += nn.Dense(64)(nn.gelu(nn.Dense(256)(nn.LayerNorm()(x))))
        return nn.Dense(10)(nn.LayerNorm()(x).mean(1))


def convnet() -> Task:
    """The task of :class:`ConvNet`: its starting parameters by key, and its logits."""
    graphdef, _, rest = nnx.split(ConvNet(nnx.Rngs(0)), nnx.Param, ...)
    start = lambda key: nnx.split(ConvNet(nnx.Rngs(key)), nnx.Param, ...)[1]
    return start, lambda params, images: nnx.merge(graphdef, params, rest, copy=True)(images)


def transformer() -> Task:
    """The task of :class:`Transformer`, likewise."""
    model = Transformer()
    start = lambda key: model.init(key, jnp.zeros((1, 8, 8)))["params"]
    return start, lambda params, images: model.apply({"params": params}, images)


def is_matrix(path: tuple[Any, ...], param: jax.Array) -> bool:
    """Whether a parameter is a matrix that AGD reads right, and so nothing of attention."""
    return param.ndim in (2, 4) and "bias" not in jax.tree_util.keystr(path)


def agd_and_adam(geometry: agd_jax.Geometry) -> optax.GradientTransformationExtraArgs:
    """AGD for the matrices, Adam for the rest."""
    label = lambda path, param: "agd" if is_matrix(path, param) else "adam"
    labels = functools.partial(jax.tree.map_with_path, label)
    return optax.partition({"agd": agd_jax.agd(), "adam": optax.adam(ADAM)}, labels)


def by_shapes(geometry: agd_jax.Geometry) -> optax.GradientTransformationExtraArgs:
    """AGD that knows nothing but shapes."""
    return agd_jax.agd()


def by_geometry(geometry: agd_jax.Geometry) -> optax.GradientTransformationExtraArgs:
    """AGD that knows how each parameter is used."""
    return agd_jax.agd(geometry=geometry)


# What a row of the table says -> the optimiser, and which parameters start as orthogonal matrices.
OPTIMIZERS = {
    "AGD by shapes": (by_shapes, lambda *_: True),
    "AGD by shapes, Flax's own start": (by_shapes, lambda *_: False),
    "AGD with a geometry": (by_geometry, lambda *_: True),
    "the same, Flax's own start": (by_geometry, lambda *_: False),
    "AGD for matrices, Adam for the rest": (agd_and_adam, is_matrix),
    "AGD and Adam, Flax's own start": (agd_and_adam, lambda *_: False),
    f"Adam, {ADAM:g}": (lambda _: optax.adam(ADAM), lambda *_: False),
}


def final_losses(
    task: Task,
    make: Callable[[agd_jax.Geometry], optax.GradientTransformation],
    orthogonal: Callable[..., bool],
    options: Options,
) -> list[float]:
    """Trains once for each seed, and returns the mean losses of the last batches."""
    start, logits_of = task
    images, labels = load_digits(return_X_y=True)
    images, labels = jnp.asarray(images / 8 - 1).reshape(-1, 8, 8), jnp.asarray(labels)
    geometry = agd_jax.geometry_of(logits_of, start(jax.random.key(0)), images[:1])
    tx = make(geometry)

    def loss(params: Any, batch: jax.Array) -> jax.Array:
        logits = logits_of(params, images[batch])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch]).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, opt_state: Any, key: jax.Array) -> tuple[Any, Any, jax.Array]:
        batch = jax.random.choice(key, len(labels), (BATCH,), replace=False)
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    def train(key: jax.Array) -> float:
        params, losses = start(key), []
        known = geometry if make is by_geometry else None
        redrawn = agd_jax.orthogonal_init(key, params, known)
        choose = lambda path, new, old: new if orthogonal(path, old) else old
        params = jax.tree.map_with_path(choose, redrawn, params)
        opt_state = tx.init(params)
        for i in range(options.steps):
            params, opt_state, value = step(params, opt_state, jax.random.fold_in(key, i))
            losses.append(value)
        return float(jnp.mean(jnp.stack(losses[-LAST:])))

    return [train(jax.random.key(seed)) for seed in range(options.seeds)]


def main(options: Options) -> None:
    """Prints the table."""
    # Of attention's axes, which are among what is measured here.
    warnings.filterwarnings("ignore", "from shapes alone")
    tasks = {"NNX CNN with BatchNorm": convnet(), "Linen transformer": transformer()}
    print(f"{'training loss':36s}", *(f"{name:>24s}" for name in tasks))
    for name, (make, orthogonal) in OPTIMIZERS.items():
        losses = [final_losses(task, make, orthogonal, options) for task in tasks.values()]
        print(f"{name:36s}", *(f"{np.median(each):24.4f}" for each in losses), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options, use_underscores=True))
