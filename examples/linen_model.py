"""A Flax Linen model of your own, trained with AGD through TrainState."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits

import agd_jax

EPOCHS, BATCH = 20, 100


class Network(nn.Module):
    """Two convolutions and a dense layer."""

    @nn.compact
    def __call__(self, x):
        """Maps ``(batch, 8, 8, 1)`` to ``(batch, 10)``."""
        x = nn.relu(nn.Conv(16, (3, 3), use_bias=False)(x))
        x = nn.relu(nn.Conv(32, (3, 3), strides=2, use_bias=False)(x))
        return nn.Dense(10, use_bias=False)(x.reshape(len(x), -1))


@jax.jit
def train_step(state, x, y):
    """One step; returns the new state, and the loss before it."""

    def loss(params):
        logits = state.apply_fn({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    value, grads = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=grads), value


def main():
    """Trains, and prints how it goes."""
    images, labels = load_digits(return_X_y=True)
    images, labels = jnp.asarray(images.reshape(-1, 8, 8, 1) / 8 - 1), jnp.asarray(labels)
    train, test = jnp.split(jax.random.permutation(jax.random.key(0), len(labels)), [1400])

    model = Network()
    params = model.init(jax.random.key(1), images[:1])["params"]
    params = agd_jax.orthogonal_init(jax.random.key(2), params)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=agd_jax.agd())
    for epoch in range(EPOCHS):
        losses = []
        for i in jax.random.permutation(jax.random.key(epoch), train).reshape(-1, BATCH):
            state, loss = train_step(state, images[i], labels[i])
            losses.append(loss)
        logits = model.apply({"params": state.params}, images[test])
        accuracy = (logits.argmax(axis=1) == labels[test]).mean()
        print(f"epoch {epoch + 1:2d}  loss {jnp.stack(losses).mean():.4f}  test {accuracy:.1%}")


if __name__ == "__main__":
    main()
