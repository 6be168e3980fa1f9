"""A task on text: the characters of Shakespeare, and of our README for a quick look."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

from experiments.tasks import Budget, Data, Task
from input_pipeline import prepared
from input_pipeline.errors import DataError
from models.gpt import GPT
from training.step import LOSSES

# Where the text is, in the folder of TensorFlow Datasets.
FILE = "shakespeare/input.txt"
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
VALIDATION_BATCHES, VALIDATION_BATCH = 10, 64


@functools.cache
def read(budget: Budget) -> str:
    """Reads the text; raises DataError if it is not there."""
    if budget == "smoke":
        return (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    path = prepared.data_path() / FILE
    if not path.exists():
        raise DataError(f"{path}: is not there; download {URL} to it")
    return path.read_text()


@functools.cache
def data(text: str, length: int) -> Data:
    """Splits a text into nine tenths for training and one for validation, as windows."""
    characters = sorted(set(text))
    numbers = {character: number for number, character in enumerate(characters)}
    tokens = np.array([numbers[character] for character in text], np.int32)
    split = len(tokens) * 9 // 10
    # The same windows for all runs, evenly spread.
    count = VALIDATION_BATCHES * VALIDATION_BATCH
    starts = np.linspace(split, len(tokens) - length - 1, count).astype(np.int32)

    def windows(tokens: jax.Array, starts: jax.Array) -> tuple[jax.Array, jax.Array]:
        window = jax.vmap(lambda i: jax.lax.dynamic_slice_in_dim(tokens, i, length + 1))(starts)
        return window[:, :-1], window[:, 1:]

    def chosen(rng: np.random.Generator, steps: int, batch_size: int) -> np.ndarray:
        return rng.integers(split - length, size=(steps, batch_size), dtype=np.int32)

    def train(data: Any, chosen: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        del key  # Nothing is augmented.
        return windows(data["tokens"], chosen)

    def validation(data: Any, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        return windows(data["tokens"], data["starts"][index])

    arrays = {"tokens": tokens, "starts": starts.reshape(VALIDATION_BATCHES, -1)}
    return Data(jax.device_put(arrays), chosen, train, validation, VALIDATION_BATCHES)


def as_gpt2(model: GPT, rngs: nnx.Rngs) -> GPT:
    """Gives the matrices the starting weights of GPT-2, in place of Flax's larger ones.

    They are normal with a deviation of 0.02, less for those whose results are added to the residual
    stream: by the root of their number.
    """
    params = nnx.state(model, nnx.Param)
    for path, param in nnx.to_flat_state(params):
        if path[-1] == "kernel":
            added = 2 * len(model.blocks) if {"out", "down"} & set(path) else 1
            param[...] = 0.02 / math.sqrt(added) * rngs.params.normal(param.shape)
    nnx.update(model, params)
    return model


def gpt(
    budget: Budget,
    *,
    depth: int | None = None,
    width: int | None = None,
    length: int = 64,
    batch_size: int = 12,
    steps: int | None = None,
    start: Literal["flax", "gpt2"] = "flax",
) -> Task:
    """A small language model on characters, of the size that nanoGPT trains on a laptop."""
    usual = (1, 32) if budget == "smoke" else (4, 128)
    depth, width = depth or usual[0], width or usual[1]

    def network(rngs: nnx.Rngs) -> GPT:
        model = GPT(len(set(read(budget))), length, depth=depth, width=width, rngs=rngs)
        return as_gpt2(model, rngs) if start == "gpt2" else model

    steps = steps or {"smoke": 10, "cpu": 1000, "gpu": 5000}[budget]
    text = "readme" if budget == "smoke" else "shakespeare"
    settings = {"depth": depth, "width": width, "length": length, "start": start, "text": text}
    return Task(
        "gpt",
        {**settings, "loss": "xent", "validation": VALIDATION_BATCHES * VALIDATION_BATCH},
        network,
        lambda: data(read(budget), length),
        LOSSES["xent"],
        batch_size,
        steps,
    )
