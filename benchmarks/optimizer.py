"""What one update of ResNet-50's parameters costs: AGD side by side with other optimisers.

    python benchmarks/optimizer.py

times one jitted update of the 25.5 million parameters, which are donated with the state: gradients
in, parameters out, for `agd`, `optax.sgd`, `optax.adam` and `optax.contrib.muon`. All take turns,
and the ratios are medians of those within a turn, since machines vary.

The floor of an optimiser is the time to move the bytes that it must: sgd reads gradients and
parameters and writes parameters; adam reads and writes two moments besides; agd reads the gradients
twice, as every parameter's step depends on the norms of all. The bandwidth is what sgd reaches,
whose arithmetic is nothing beside its bytes.
"""

import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import tyro
from optax.contrib import MuonDimensionNumbers

sys.path.insert(0, os.fspath(Path(__file__).parent.parent))
import agd_jax
from training import sharding
from training.config import TrainConfig
from training.plan import make_plan

# How often an array of the size of the parameters must be read or written, at the least.
PASSES = {"agd": 4, "sgd": 3, "adam": 7}


@dataclasses.dataclass(frozen=True)
class Options:
    """Times one update of the parameters of a network."""

    arch: str = "resnet50"
    """The network."""
    image_size: int = 224
    """Side of its images."""
    turns: int = 15
    """How often each is timed."""
    muon: bool = True
    """Whether to time muon too, which takes hundreds of times as long."""


def main(options: Options) -> None:
    """Prints the table of ``benchmarks/RESULTS.md``."""
    params = parameters(options)
    leaves = jax.tree.leaves(params)
    count, size = sum(p.size for p in leaves), sum(p.nbytes for p in leaves)
    device = jax.devices()[0]
    print(
        f"{count:,} parameters in {len(leaves)} tensors, {size / 1e6:.1f} MB; {device.device_kind}"
    )
    optimisers = {
        "agd": agd_jax.agd(),
        "spectral": agd_jax.agd(norm="spectral"),
        "sgd": optax.sgd(0.1),
        "adam": optax.adam(1e-3),
    }
    if options.muon:
        optimisers["muon"] = optax.contrib.muon(1e-3, muon_weight_dimension_numbers=matrices)
    updates = {name: Update(params, update(tx), tx.init(params)) for name, tx in optimisers.items()}
    seconds = turns(updates, options.turns)
    bandwidth = PASSES["sgd"] * size / statistics.median(seconds["sgd"])
    print(f"bandwidth {bandwidth / 1e9:.1f} GB/s")
    print("optimiser        ms  state, bytes  of adam's time  of its floor")
    for name, tx in optimisers.items():
        shapes = jax.tree.leaves(jax.eval_shape(tx.init, params))
        state = sum(x.size * x.dtype.itemsize for x in shapes)
        milliseconds = 1000 * statistics.median(seconds[name])
        of_adam = ratio(seconds[name], seconds["adam"])
        row = f"{name:9s}  {milliseconds:8.2f}  {state:12,d}  {of_adam:14.2f}"
        if name in PASSES:
            of_floor = ratio(seconds[name], seconds["sgd"]) * PASSES["sgd"] / PASSES[name]
            row += f"  {of_floor:12.2f}"
        print(row)


def matrices(params: dict[str, jax.Array]) -> dict[str, MuonDimensionNumbers | None]:
    """The axes of matrices and kernels, with their taps among the inputs, as Muon is told them."""

    def axes(param: jax.Array) -> MuonDimensionNumbers | None:
        last = param.ndim - 1
        return MuonDimensionNumbers(tuple(range(last)), last) if last else None

    return jax.tree.map(axes, params)


def ratio(a: list[float], b: list[float]) -> float:
    """The median of the ratios within the turns."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def parameters(options: Options) -> dict[str, jax.Array]:
    """The parameters of the network, with any values."""
    config = TrainConfig(arch=options.arch, dataset="imagenet", image_size=options.image_size)
    plan = make_plan(config.resolved(), sharding.make_mesh(config, jax.devices()[:1]))
    names = jax.tree_util.tree_leaves_with_path(plan.abstract_state.params)
    keys = jax.random.split(jax.random.key(0), len(names))
    return {
        jax.tree_util.keystr(path): jax.random.normal(key, leaf.shape, leaf.dtype)
        for key, (path, leaf) in zip(keys, names, strict=True)
    }


def update(tx: optax.GradientTransformation) -> Callable:
    """One step of an optimiser, as a function of gradients, parameters and state."""

    def step(grads, params, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


class Update:
    """An update that has been compiled, with parameters and a state of its own."""

    def __init__(self, params: dict[str, jax.Array], step: Callable, state: optax.OptState):
        self._grads = params
        self._step = jax.jit(step, donate_argnums=(1, 2))
        self._carry = jax.tree.map(jnp.copy, (params, state))
        self()

    def __call__(self) -> float:
        """Takes the step, and returns the seconds that it took."""
        start = time.perf_counter()
        self._carry = jax.block_until_ready(self._step(self._grads, *self._carry))
        return time.perf_counter() - start


def turns(updates: dict[str, Update], count: int) -> dict[str, list[float]]:
    """The seconds of each in every turn; each is called twice, and the second call timed."""
    seconds = {name: [] for name in updates}
    for _ in range(count):
        for name, one in updates.items():
            one()
            seconds[name].append(one())
    return seconds


if __name__ == "__main__":
    main(tyro.cli(Options, use_underscores=True))
