"""Fine-tuning: AGD goes on from a checkpoint that Adam has left, for new classes."""

import tempfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from sklearn.datasets import load_digits

import agd_jax

EPOCHS, BATCH = 20, 50


class Network(nn.Module):
    """Two convolutions with GroupNorm, and a dense layer."""

    @nn.compact
    def __call__(self, x):
        """Maps ``(batch, 8, 8, 1)`` to ``(batch, 5)``."""
        for width in (16, 32):
            x = nn.relu(nn.GroupNorm(4)(nn.Conv(width, (3, 3))(x)))
        return nn.Dense(5, name="head")(x.reshape(len(x), -1))


def train(params, tx, images, labels):
    """Trains on all but the last 200 images, prints how it goes, and returns the parameters."""
    apply, opt_state = Network().apply, tx.init(params)

    @jax.jit
    def step(params, opt_state, x, y):
        loss = lambda p: optax.softmax_cross_entropy_with_integer_labels(apply(p, x), y).mean()
        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    for epoch in range(EPOCHS):
        for i in jax.random.permutation(jax.random.key(epoch), 650).reshape(-1, BATCH):
            params, opt_state, loss = step(params, opt_state, images[i], labels[i])
        accuracy = (apply(params, images[-200:]).argmax(axis=1) == labels[-200:]).mean()
        print(f"epoch {epoch + 1:2d}  loss {loss:.4f}  test {accuracy:.1%}")
    return params


images, labels = load_digits(return_X_y=True)
images, labels, small = jnp.asarray(images.reshape(-1, 8, 8, 1) / 8 - 1), labels, labels < 5
params = Network().init(jax.random.key(0), images[:1])
with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
    params = train(params, optax.adam(1e-3), images[small], labels[small])
    checkpointer.save(f"{folder}/digits", params)
    params = checkpointer.restore(f"{folder}/digits", params)

# The head starts anew, from zero; all else as it was.
params["params"]["head"] = jax.tree.map(jnp.zeros_like, params["params"]["head"])
tx = agd_jax.agd(geometry=agd_jax.geometry_of(Network().apply, params, images[:1]))
train(params, tx, images[~small], labels[~small] - 5)
