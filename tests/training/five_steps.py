"""Five steps of a network on several meshes of eight virtual devices; prints what they measure.

Run by ``test_sharding.py`` in a process of its own, which has the devices.
"""

import json
import sys

import jax
import numpy as np
import pytest

from tests.helpers import small_resnet18
from training import sharding
from training.config import TrainConfig
from training.data import load_data
from training.feeds import make_feed
from training.plan import make_plan

STEPS = 5


def five_steps(config, devices):
    with jax.enable_x64(config.precision == "f64"):
        mesh = sharding.make_mesh(config, devices)
        plan = make_plan(config, mesh)
        state = plan.create_train_state()
        starting_weights = [np.asarray(p) for p in jax.tree.leaves(state.params)]
        feed = make_feed(plan, load_data(config))
        state, measured = feed.train(state, feed.zero_metrics(), STEPS)
        assert state.step == STEPS
        expected = sharding.of_state(mesh, state)
        kept = jax.tree.map(lambda a, s: a.sharding.is_equivalent_to(s, a.ndim), state, expected)
        assert all(jax.tree.leaves(kept))
        # With momentum, the weights are averaged too, and it is their average that is tested.
        averaged = feed.with_statistics(state.averaged or state.model)
        (tested,) = feed.evaluate([averaged])
        params = jax.tree.leaves(state.params)
        # What is measured last depends on every step before.
        return {
            "loss": float(measured.sums.loss),
            "test_loss": float(tested.loss),
            "eta": float(measured.eta),
            "gradient_summary": float(measured.gradient_summary),
            "start": [float(np.linalg.norm(p)) for p in starting_weights],
            "start_entries": [float(p.ravel()[-1]) for p in starting_weights],
            "params": [float(np.linalg.norm(p)) for p in params],
            "batch_stats": [
                float(np.sum(s))
                for s in jax.tree.leaves((state.batch_stats, averaged["batch_stats"]))
            ],
            "split": sum(not p.sharding.is_fully_replicated for p in params),
            "bytes": sum(p.addressable_shards[0].data.nbytes for p in params),
            "opt_bytes": sum(
                p.addressable_shards[0].data.nbytes for p in jax.tree.leaves(state.opt_state)
            ),
        }


def main(arch, precision, norm, bn_group, *meshes):
    if arch == "resnet18":
        small_resnet18(pytest.MonkeyPatch())
    fields = {"arch": arch, "precision": precision, "norm": norm, "test_bs": 40}
    fields |= {"bn_group": int(bn_group), "average": norm == "spectral"}
    # On eight devices, twelve examples on each of them, or eight.
    fields |= {"train_bs": 96 if int(bn_group) else 64}
    if arch == "fcn":
        fields |= {"depth": 5, "width": 32}
    results = []
    for mesh in meshes:
        config = TrainConfig(**fields, mesh=None if mesh == "one" else mesh).resolved()
        results.append(five_steps(config, jax.devices()[: 1 if mesh == "one" else None]))
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
