"""Batches too large for memory: AGD on the mean gradient of several small ones."""

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import agd_jax

EPOCHS, SMALL_BATCH, SMALL_BATCHES = 30, 25, 4

# AGD sees every fourth call, with the mean of four gradients: a batch of 100.
tx = optax.MultiSteps(agd_jax.agd(), every_k_schedule=SMALL_BATCHES)


def network(params, x):
    """Maps ``(batch, 64)`` to ``(batch, 10)``; plain JAX needs no library for this."""
    for kernel in params[:-1]:
        x = jnp.sqrt(2) * jax.nn.relu(x @ kernel)
    return x @ params[-1]


@jax.jit
def train_step(params, state, x, y):
    """A small batch; returns params, state, and its loss before the step."""

    def loss(params):
        return optax.softmax_cross_entropy_with_integer_labels(network(params, x), y).mean()

    value, grads = jax.value_and_grad(loss)(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value


def main():
    """Trains, and prints how it goes, with the learning rate that AGD found."""
    images, labels = load_digits(return_X_y=True)
    images, labels = jnp.asarray(images / 8 - 1), jnp.asarray(labels)
    train, test = jnp.split(jax.random.permutation(jax.random.key(0), len(labels)), [1400])

    shapes = [(64, 128), (128, 128), (128, 10)]
    params = agd_jax.orthogonal_init(jax.random.key(1), [jnp.zeros(s) for s in shapes])
    state = tx.init(params)
    for epoch in range(EPOCHS):
        losses = []
        for i in jax.random.permutation(jax.random.key(epoch), train).reshape(-1, SMALL_BATCH):
            params, state, loss = train_step(params, state, images[i], labels[i])
            losses.append(loss)
        accuracy = (network(params, images[test]).argmax(axis=1) == labels[test]).mean()
        eta, mean_loss = optax.tree.get(state, "eta"), jnp.stack(losses).mean()
        print(f"epoch {epoch + 1:2d}  loss {mean_loss:.4f}  eta {eta:.4f}  test {accuracy:.1%}")


if __name__ == "__main__":
    main()
