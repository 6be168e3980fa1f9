"""One run of an optimiser on a task, by programs that are compiled once for all of its rates."""

from __future__ import annotations

import datetime
import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import agd_jax
from experiments.optimizers import OPTIMIZERS
from experiments.tasks import Task
from training.state import split

# Measurements along a run: of the training loss, and of each so many of the validation loss.
POINTS = 40
VALIDATED = 2


class State(NamedTuple):
    """What a step changes: parameters, running averages, the optimiser's state."""

    params: Any
    batch_stats: Any
    opt_state: Any


class Programs(NamedTuple):
    """The compiled programs of an optimiser on a task."""

    init: Callable[[jax.Array, jax.Array], State]
    steps: Callable[..., tuple[State, jax.Array]]
    validate: Callable[[State, Any], tuple[jax.Array, jax.Array]]


def key_of(task: Task, optimizer: str, rate: float, seed: int) -> dict[str, Any]:
    """Returns all that determines a run."""
    return {
        "task": task.name,
        **task.settings,
        "batch_size": task.batch_size,
        "steps": task.steps,
        "optimizer": optimizer,
        "rate": rate,
        "seed": seed,
    }


def compile_programs(task: Task, optimizer: str) -> Programs:
    """Builds the programs of an optimiser on a task; each compiles when it is first called."""
    entry, data = OPTIMIZERS[optimizer], task.data()
    graphdef, *_ = split(nnx.eval_shape(lambda: task.network(nnx.Rngs(0))))

    @jax.jit
    def init(key: jax.Array, rate: jax.Array) -> State:
        start, orthogonal = jax.random.split(key)
        _, params, batch_stats = split(task.network(nnx.Rngs(start)))
        if entry.orthogonal:
            params = agd_jax.orthogonal_init(orthogonal, params)
        return State(params, batch_stats, entry.make(rate, task.steps).init(params))

    def step(
        state: State, rate: jax.Array, arrays: Any, chosen: jax.Array, key: jax.Array
    ) -> tuple[State, jax.Array]:
        inputs, targets = data.train(arrays, chosen, key)

        def objective(params: Any) -> tuple[jax.Array, Any]:
            model = nnx.merge(graphdef, params, state.batch_stats, copy=True)
            model.train()
            loss = jnp.mean(task.loss(model(inputs), targets))
            return loss, nnx.state(model, nnx.BatchStat)

        (loss, batch_stats), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
        tx = entry.make(rate, task.steps)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        return State(optax.apply_updates(state.params, updates), batch_stats, opt_state), loss

    # One program for any number of steps: XLA's CPU backend runs a loop of known length on one
    # thread, and convolutions in any loop.
    @functools.partial(jax.jit, donate_argnums=0)
    def loop(
        state: State,
        rate: jax.Array,
        arrays: Any,
        rows: jax.Array,
        key: jax.Array,
        first: Any,
        last: Any,
    ) -> tuple[State, jax.Array]:
        def body(i: jax.Array, carry: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
            state, total = carry
            state, loss = step(state, rate, arrays, rows[i], jax.random.fold_in(key, i))
            return state, total + loss

        state, total = jax.lax.fori_loop(first, last, body, (state, jnp.zeros([])))
        return state, total / (last - first)

    one = jax.jit(step, donate_argnums=0)

    def one_by_one(
        state: State,
        rate: jax.Array,
        arrays: Any,
        rows: jax.Array,
        key: jax.Array,
        first: int,
        last: int,
    ) -> tuple[State, jax.Array]:
        losses = []
        for i in range(first, last):
            state, loss = one(state, rate, arrays, rows[i], jax.random.fold_in(key, i))
            losses.append(loss)
        return state, jnp.mean(jnp.stack(losses))

    @jax.jit
    def validate(state: State, arrays: Any) -> tuple[jax.Array, jax.Array]:
        params = entry.eval_params(state.opt_state, state.params)
        model = nnx.merge(graphdef, params, state.batch_stats, copy=True)
        model.eval()

        def body(index: jax.Array, sums: jax.Array) -> jax.Array:
            inputs, targets = data.validation(arrays, index)
            logits = model(inputs)
            correct = jnp.argmax(logits, axis=-1) == targets
            return sums + jnp.stack([jnp.mean(task.loss(logits, targets)), jnp.mean(correct)])

        loss, accuracy = jax.lax.fori_loop(0, data.batches, body, jnp.zeros(2)) / data.batches
        return loss, accuracy

    alone = task.convolutional and jax.default_backend() == "cpu"
    return Programs(init, one_by_one if alone else loop, validate)


def run(task: Task, programs: Programs, optimizer: str, rate: float, seed: int) -> dict[str, Any]:
    """Trains once.

    Returns:
      A record, as JSON values: the ``key``; ``train``, ``[step, loss]`` along the run, each loss
      the mean since the one before; ``validation``, ``[step, loss, accuracy, seconds]``, the
      seconds of training alone; ``diverged``, whether a loss was not finite, which ends the run;
      and when, on what and with which versions it ran.
    """
    data = task.data()
    traced = jnp.float32(rate)
    key, augmentation = jax.random.split(jax.random.key(seed))
    state = programs.init(key, traced)
    rows = jnp.asarray(data.chosen(np.random.default_rng(seed), task.steps, task.batch_size))
    train, validation, seconds, diverged = [], [], 0.0, False
    stops = sorted({round(task.steps * (i + 1) / POINTS) for i in range(POINTS)} - {0})
    step = 0
    # Compiles, which is not to count.
    copy = jax.tree.map(jnp.copy, state)
    jax.block_until_ready(programs.steps(copy, traced, data.arrays, rows, augmentation, 0, 1))
    for number, stop in enumerate(stops):
        start = time.perf_counter()
        state, loss = programs.steps(state, traced, data.arrays, rows, augmentation, step, stop)
        train.append([stop, float(loss)])
        seconds += time.perf_counter() - start
        step = stop
        diverged = not math.isfinite(train[-1][1])
        if diverged or stop == task.steps or number % VALIDATED == VALIDATED - 1:
            found = map(float, programs.validate(state, data.arrays))
            validation.append([stop, *found, round(seconds, 3)])
        if diverged:
            break
    return {
        "key": key_of(task, optimizer, rate, seed),
        "train": train,
        "validation": validation,
        "diverged": diverged,
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "versions": {m.__name__: m.__version__ for m in (jax, flax, optax)},
    }
