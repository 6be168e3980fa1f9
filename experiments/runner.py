"""One run of an optimiser on a task, by programs that are compiled once for all of its rates."""

from __future__ import annotations

import datetime
import functools
import math
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from optax import contrib

import agd_jax
from experiments.optimizers import OPTIMIZERS
from experiments.tasks import Task
from training.state import geometry_of, split

# Measurements along a run: of the training loss, and of each so many of the validation loss.
POINTS = 40
VALIDATED = 2
# Batches that give averaged weights the statistics of BatchNorm that belong to them.
STATISTICS = 20
# Those that this process may use, where the system says so.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


class State(NamedTuple):
    """What a step changes: parameters, running averages, the optimiser's state."""

    params: Any
    batch_stats: Any
    opt_state: Any


class Seen(NamedTuple):
    """What is summed up over steps: the loss, and the range of AGD's eta (infinite for others)."""

    loss: jax.typing.ArrayLike
    eta_min: jax.typing.ArrayLike
    eta_max: jax.typing.ArrayLike


NOTHING = Seen(*map(np.float32, (0, math.inf, -math.inf)))


def add(a: Seen, b: Seen) -> Seen:
    """Adds what was seen over some steps to what was seen before."""
    low, high = jnp.minimum(a.eta_min, b.eta_min), jnp.maximum(a.eta_max, b.eta_max)
    return Seen(a.loss + b.loss, low, high)


class Programs(NamedTuple):
    """The compiled programs of an optimiser on a task.

    Attributes:
      init: ``(key, rate)`` to the state before the first step.
      steps: ``(state, rate, arrays, rows, key, first, last)`` to the state after steps ``first`` to
        ``last - 1`` and what was :class:`Seen`; uses up the state that it is given.
      validate: ``(state, arrays, rows, key)`` to loss and accuracy.
    """

    init: Callable[[jax.Array, jax.Array], State]
    steps: Callable[..., tuple[State, Seen]]
    validate: Callable[..., tuple[jax.Array, jax.Array]]


def key_of(task: Task, optimizer: str, rate: float, seed: int) -> dict[str, Any]:
    """Returns all that determines a run."""
    return {
        "task": task.name,
        **task.settings,
        "batch_size": task.batch_size,
        "steps": task.steps,
        "optimizer": optimizer,
        "optimizer_settings": dict(OPTIMIZERS[optimizer].settings),
        "rate": rate,
        "seed": seed,
    }


def compile_programs(task: Task, optimizer: str) -> Programs:
    """Builds the programs of an optimiser on a task; each compiles when it is first called."""
    entry, data = OPTIMIZERS[optimizer], task.data()
    graphdef, *shapes = split(nnx.eval_shape(lambda: task.network(nnx.Rngs(0))))

    inputs, _ = jax.eval_shape(data.validation, data.arrays, 0)
    params, batch_stats = shapes
    geometry = geometry_of(graphdef, params, batch_stats, inputs)

    @jax.jit
    def init(key: jax.Array, rate: jax.Array) -> State:
        start, orthogonal = jax.random.split(key)
        _, params, batch_stats = split(task.network(nnx.Rngs(start)))
        if entry.orthogonal:
            params = agd_jax.orthogonal_init(orthogonal, params, geometry)
        tx = entry.create(rate, task.steps, geometry)
        return State(params, batch_stats, tx.init(params))

    def step(
        state: State, rate: jax.Array, arrays: Any, chosen: jax.Array, key: jax.Array
    ) -> tuple[State, Seen]:
        inputs, targets = data.train(arrays, chosen, key)

        def objective(params: Any) -> tuple[jax.Array, Any]:
            model = nnx.merge(graphdef, params, state.batch_stats, copy=True)
            model.train()
            loss = jnp.mean(task.loss(model(inputs), targets))
            return loss, nnx.state(model, nnx.BatchStat)

        (loss, batch_stats), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
        tx = entry.create(rate, task.steps, geometry)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        eta = optax.tree.get(opt_state, "eta", default=None)
        low, high = (NOTHING.eta_min, NOTHING.eta_max) if eta is None else (eta, eta)
        seen = Seen(loss, low, high)
        return State(optax.apply_updates(state.params, updates), batch_stats, opt_state), seen

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
    ) -> tuple[State, Seen]:
        def body(i: jax.Array, carry: tuple[State, Seen]) -> tuple[State, Seen]:
            state, seen = step(carry[0], rate, arrays, rows[i], jax.random.fold_in(key, i))
            return state, add(carry[1], seen)

        carry: tuple[State, Seen] = jax.lax.fori_loop(first, last, body, (state, NOTHING))
        return carry

    one = jax.jit(step, donate_argnums=0)

    def one_by_one(
        state: State,
        rate: jax.Array,
        arrays: Any,
        rows: jax.Array,
        key: jax.Array,
        first: int,
        last: int,
    ) -> tuple[State, Seen]:
        total = NOTHING
        for i in range(first, last):
            state, seen = one(state, rate, arrays, rows[i], jax.random.fold_in(key, i))
            total = add(total, seen)
        return state, total

    @jax.jit
    def validate(
        state: State, arrays: Any, rows: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        params, batch_stats = state.params, state.batch_stats
        if entry.averages:
            params = contrib.schedule_free_eval_params(state.opt_state, params)
            batch_stats = statistics_of(params, batch_stats, arrays, rows, key)
        model = nnx.merge(graphdef, params, batch_stats, copy=True)
        model.eval()

        def body(index: jax.Array, sums: jax.Array) -> jax.Array:
            inputs, targets = data.validation(arrays, index)
            logits = model(inputs)
            correct = jnp.argmax(logits, axis=-1) == targets
            return sums + jnp.stack([jnp.mean(task.loss(logits, targets)), jnp.mean(correct)])

        loss, accuracy = jax.lax.fori_loop(0, data.batches, body, jnp.zeros(2)) / data.batches
        return loss, accuracy

    def statistics_of(
        params: Any, batch_stats: Any, arrays: Any, rows: jax.Array, key: jax.Array
    ) -> Any:
        """Returns BatchNorm's running averages after some batches with other weights."""
        if not jax.tree.leaves(batch_stats):
            return batch_stats

        def body(i: jax.Array, batch_stats: Any) -> Any:
            model = nnx.merge(graphdef, params, batch_stats, copy=True)
            model.train()
            model(data.train(arrays, rows[i], jax.random.fold_in(key, i))[0])
            return nnx.state(model, nnx.BatchStat)

        return jax.lax.fori_loop(0, min(STATISTICS, task.steps), body, batch_stats)

    alone = task.convolutional and jax.default_backend() == "cpu"
    return Programs(init, one_by_one if alone else loop, validate)


@jax.jit
def relative_size(before: Any, after: Any) -> jax.Array:
    """Returns the Frobenius norm of a step over that of its matrix, averaged over all matrices."""
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    norm = jnp.linalg.norm
    sizes = [norm((b - a).ravel()) / norm(a.ravel()) for a, b in pairs if a.ndim > 1]
    return jnp.mean(jnp.stack(sizes))


def run(task: Task, programs: Programs, optimizer: str, rate: float, seed: int) -> dict[str, Any]:
    """Trains once.

    Returns:
      A record, as JSON values: the ``key``; ``train``, columns along the run: the ``step``, the
      mean ``loss`` since the point before, the smallest and largest ``eta`` since then (of AGD
      alone), and the relative ``size`` of the last step; ``validation``, likewise: ``step``,
      ``loss`` and ``accuracy``; ``diverged``, whether a loss was not finite, which ends the run;
      ``seconds_per_step``, between the two points where it was quickest; and when, on what and
      with which versions it ran.
    """
    data = task.data()
    traced = jnp.float32(rate)
    key, augmentation = jax.random.split(jax.random.key(seed))
    state = programs.init(key, traced)
    rows = jnp.asarray(data.chosen(np.random.default_rng(seed), task.steps, task.batch_size))
    arguments = traced, data.arrays, rows, augmentation
    train: dict[str, list[float]] = {"step": [], "loss": [], "size": []}
    if OPTIMIZERS[optimizer].geometry:
        train |= {"eta_min": [], "eta_max": []}
    validation: dict[str, list[float]] = {"step": [], "loss": [], "accuracy": []}
    seconds, step, diverged = [], 0, False
    # Compiles, which is not to count.
    jax.block_until_ready(programs.steps(jax.tree.map(jnp.copy, state), *arguments, 0, 1))
    stops = sorted({round(task.steps * (i + 1) / POINTS) for i in range(POINTS)} - {0})
    for number, stop in enumerate(stops, 1):
        # The last step alone, to see its size.
        start = time.perf_counter()
        state, seen = programs.steps(state, *arguments, step, stop - 1)
        before = jax.tree.map(jnp.copy, state.params)
        state, last = programs.steps(state, *arguments, stop - 1, stop)
        total, eta_min, eta_max = (float(x) for x in jax.device_get(add(seen, last)))
        seconds.append((time.perf_counter() - start) / (stop - step))
        found = {
            "loss": total / (stop - step),
            "size": float(relative_size(before, state.params)),
            "eta_min": eta_min,
            "eta_max": eta_max,
        }
        train["step"].append(stop)
        for column, values in list(train.items())[1:]:
            values.append(_short(found[column]))
        step, diverged = stop, not math.isfinite(total)
        if diverged or number == len(stops) or number % VALIDATED == 0:
            loss, accuracy = programs.validate(state, data.arrays, rows, augmentation)
            validation["step"].append(stop)
            validation["loss"].append(_short(float(loss)))
            validation["accuracy"].append(_short(float(accuracy)))
        if diverged:
            break
    return {
        "key": key_of(task, optimizer, rate, seed),
        "train": train,
        "validation": validation,
        "diverged": diverged,
        "seconds_per_step": _short(min(seconds)),
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "cores": CORES,
        "versions": {m.__name__: m.__version__ for m in (jax, flax, optax)},
    }


def _short(value: float) -> float:
    """Rounds to six digits; more say nothing."""
    return float(f"{value:.6g}")
