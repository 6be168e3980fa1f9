"""One run of an optimiser on a task, by programs that are compiled once for all of its rates."""

from __future__ import annotations

import datetime
import math
import os
import time
from collections.abc import Callable, Sequence
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
    """The compiled programs of an optimiser on a task, for several runs at a time.

    All but ``arrays``, ``first`` and ``last`` have a leading axis of runs.

    Attributes:
      init: ``(key, rate)`` to the state before the first step.
      steps: ``(state, rate, arrays, rows, key, first, last)`` to the state after steps ``first`` to
        ``last - 1`` and what was :class:`Seen`; uses up the state that it is given.
      validate: ``(state, arrays, rows, key)`` to loss and accuracy.
      size: ``(before, after)``, two states with a step between, to its relative size.
    """

    init: Callable[[jax.Array, jax.Array], State]
    steps: Callable[..., tuple[State, Seen]]
    validate: Callable[..., tuple[jax.Array, jax.Array]]
    size: Callable[[Any, Any], jax.Array]


def together(task: Task) -> bool:
    """Returns whether several runs are one program: on a GPU, which small networks do not fill.

    Convolutions with several kernels are none of what it does well.
    """
    return jax.default_backend() != "cpu" and not task.convolutional


def over_runs(task: Task, function: Callable[..., Any], axes: Any = 0) -> Callable[..., Any]:
    """Returns a function of one run with a leading axis of runs, of which there may be but one."""
    if together(task):
        return jax.vmap(function, axes)

    def of_one(*args: Any) -> Any:
        of_each = axes if isinstance(axes, tuple) else (axes,) * len(args)
        first = lambda axis, arg: arg if axis is None else jax.tree.map(lambda x: x[0], arg)
        found = function(*map(first, of_each, args))
        return jax.tree.map(lambda x: jnp.asarray(x)[None], found)

    return of_one


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
            loss = jnp.mean(task.loss(model(inputs).astype(jnp.float32), targets))
            return task.loss_scale * loss, (loss, nnx.state(model, nnx.BatchStat))

        gradient = jax.value_and_grad(objective, has_aux=True)
        (_, (loss, batch_stats)), grads = gradient(state.params)
        tx = entry.create(rate, task.steps, geometry)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        eta = optax.tree.get(opt_state, "eta", default=None)
        low, high = (NOTHING.eta_min, NOTHING.eta_max) if eta is None else (eta, eta)
        seen = Seen(loss, low, high)
        return State(optax.apply_updates(state.params, updates), batch_stats, opt_state), seen

    # One program for any number of steps: XLA's CPU backend runs a loop of known length on one
    # thread, and convolutions in any loop.
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

    def one(
        state: State, rate: jax.Array, arrays: Any, rows: jax.Array, key: jax.Array, i: Any
    ) -> tuple[State, Seen]:
        return step(state, rate, arrays, rows[i], jax.random.fold_in(key, i))

    def one_by_one(state: State, *args: Any) -> tuple[State, Seen]:
        total = NOTHING
        for i in range(*args[-2:]):
            state, seen = one_step(state, *args[:-2], i)
            total = add(total, seen)
        return state, total

    def validate(
        state: State, arrays: Any, rows: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        params, batch_stats = state.params, state.batch_stats
        if entry.averaged:
            params = entry.averaged(state.opt_state, params)
            batch_stats = statistics_of(params, batch_stats, arrays, rows, key)
        model = nnx.merge(graphdef, params, batch_stats, copy=True)
        model.eval()

        def body(index: jax.Array, sums: jax.Array) -> jax.Array:
            inputs, targets = data.validation(arrays, index)
            logits = model(inputs).astype(jnp.float32)
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

    axes = (0, 0, None, 0, 0, None)
    one_step = jax.jit(over_runs(task, one, axes), donate_argnums=0)
    several = jax.jit(over_runs(task, loop, (*axes, None)), donate_argnums=0)
    alone = task.convolutional and jax.default_backend() == "cpu"
    return Programs(
        # One by one, as orthogonal_init says why.
        jax.jit(lambda *args: jax.lax.map(lambda one: init(*one), args)),
        one_by_one if alone else several,
        jax.jit(over_runs(task, validate, (0, None, 0, 0))),
        jax.jit(over_runs(task, relative_size)),
    )


def relative_size(before: Any, after: Any) -> jax.Array:
    """Returns the Frobenius norm of a step over that of its matrix, averaged over all matrices."""
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    norm = jnp.linalg.norm
    sizes = [norm((b - a).ravel()) / norm(a.ravel()) for a, b in pairs if a.ndim > 1]
    return jnp.mean(jnp.stack(sizes))


def run(
    task: Task, programs: Programs, optimizer: str, runs: Sequence[tuple[float, int]]
) -> list[dict[str, Any]]:
    """Trains once for each of some rates and seeds, in one program: only where :func:`together`.

    Returns:
      A record of each run, as JSON values: the ``key``; ``train``, columns along the run: the
      ``step``, the mean ``loss`` since the point before, the smallest and largest ``eta`` since
      then (of AGD alone), and the relative ``size`` of the last step; ``validation``, likewise:
      ``step``, ``loss`` and ``accuracy``; ``diverged``, whether a loss was not finite, which ends
      the run; ``seconds_per_step``, between the two points where it was quickest, of a run that had
      the device for itself; and when, on what and with which versions it ran.
    """
    data = task.data()
    rates = jnp.asarray([rate for rate, _ in runs], jnp.float32)
    keys = [jax.random.split(jax.random.key(seed)) for _, seed in runs]
    starts, augmentations = (jnp.stack(those) for those in zip(*keys, strict=True))
    state = programs.init(starts, rates)
    chosen = [
        data.chosen(np.random.default_rng(seed), task.steps, task.batch_size) for _, seed in runs
    ]
    rows = jnp.asarray(np.stack(chosen))
    arguments = rates, data.arrays, rows, augmentations
    columns = ["step", "loss", "size"]
    if OPTIMIZERS[optimizer].geometry:
        columns += ["eta_min", "eta_max"]
    records: list[dict[str, Any]] = [
        {
            "key": key_of(task, optimizer, rate, seed),
            "train": {column: [] for column in columns},
            "validation": {"step": [], "loss": [], "accuracy": []},
            "diverged": False,
        }
        for rate, seed in runs
    ]
    seconds, step = [], 0
    # Compiles, which is not to count.
    jax.block_until_ready(programs.steps(jax.tree.map(jnp.copy, state), *arguments, 0, 1))
    stops = sorted({round(task.steps * (i + 1) / POINTS) for i in range(POINTS)} - {0})
    for number, stop in enumerate(stops, 1):
        # The last step alone, to see its size.
        start = time.perf_counter()
        state, seen = programs.steps(state, *arguments, step, stop - 1)
        before = jax.tree.map(jnp.copy, state.params)
        state, last = programs.steps(state, *arguments, stop - 1, stop)
        total, eta_min, eta_max = jax.device_get(add(seen, last))
        seconds.append((time.perf_counter() - start) / (stop - step))
        sizes = programs.size(before, state.params)
        trained = {
            "loss": total / (stop - step),
            "size": sizes,
            "eta_min": eta_min,
            "eta_max": eta_max,
        }
        going = [i for i, record in enumerate(records) if not record["diverged"]]
        for i in going:
            _append(records[i]["train"], stop, trained, i)
            records[i]["diverged"] = not math.isfinite(total[i])
        regular = number == len(stops) or number % VALIDATED == 0
        if validated := [i for i in going if regular or records[i]["diverged"]]:
            losses, accuracies = programs.validate(state, data.arrays, rows, augmentations)
            measured = jax.device_get({"loss": losses, "accuracy": accuracies})
            for i in validated:
                _append(records[i]["validation"], stop, measured, i)
        step = stop
        if all(record["diverged"] for record in records):
            break
    for record in records:
        if len(runs) == 1:
            record["seconds_per_step"] = _short(min(seconds))
        record["date"] = datetime.date.today().isoformat()
        record["device"] = jax.devices()[0].device_kind
        record["cores"] = CORES
        record["versions"] = {m.__name__: m.__version__ for m in (jax, flax, optax)}
    return records


def _append(columns: dict[str, list[float]], step: int, found: dict[str, Any], run: int) -> None:
    """Appends what was found of one of several runs to the columns that it has."""
    columns["step"].append(step)
    for column in columns.keys() - {"step"}:
        columns[column].append(_short(float(found[column][run])))


def _short(value: float) -> float:
    """Rounds to six digits; more say nothing."""
    return float(f"{value:.6g}")
