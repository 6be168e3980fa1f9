"""The peer is the same network, loss and algorithm: in double precision, the same losses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from input_pipeline.batch import Batch
from training import sharding
from training.config import TrainConfig
from training.plan import make_plan
from training.step import LOSSES, train_step

SHAPE = (32, 32, 3)


def batches(count, size):
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield rng.standard_normal((size, *SHAPE)), rng.integers(0, 10, size)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["fcn", "vgg16", "resnet18"])
def test_the_peer_has_the_same_losses(arch):
    torch = pytest.importorskip("torch")
    from benchmarks import epoch, pytorch_peer

    network = pytorch_peer.NETWORKS[arch](SHAPE, 10).double()
    peer = pytorch_peer.Peer(network, loader=None)
    with jax.enable_x64(True):
        config = TrainConfig(arch=arch, dataset="cifar10", train_bs=16, precision="f64").resolved()
        plan = make_plan(config, sharding.make_mesh(config))
        state = plan.create_train_state()
        with torch.no_grad():
            weights = epoch.as_pytorch(state.params, SHAPE)
            for parameter, weight in zip(network.parameters(), weights, strict=True):
                parameter.copy_(torch.from_numpy(weight))
        step = jax.jit(functools.partial(train_step, plan.graphdef, plan.tx, LOSSES["mse"]))
        for images, labels in batches(3, 16):
            batch = Batch(jnp.asarray(images), jnp.asarray(labels, jnp.int32), jnp.ones(16))
            state, measured = step(state, batch)
            channels_first = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
            loss = peer.step(channels_first, torch.from_numpy(labels)).item()
            assert float(measured.sums.loss) / 16 == pytest.approx(loss, rel=1e-10)
