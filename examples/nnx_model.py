"""A Flax NNX model of your own, trained with AGD."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import load_digits

import agd_jax

EPOCHS, BATCH = 20, 100


class Network(nnx.Module):
    """Two convolutions and a dense layer."""

    def __init__(self, rngs: nnx.Rngs):
        options = {"padding": "SAME", "use_bias": False, "rngs": rngs}
        self.first = nnx.Conv(1, 16, (3, 3), **options)
        self.second = nnx.Conv(16, 32, (3, 3), strides=2, **options)
        self.out = nnx.Linear(4 * 4 * 32, 10, use_bias=False, rngs=rngs)

    def __call__(self, x):
        """Maps ``(batch, 8, 8, 1)`` to ``(batch, 10)``."""
        x = nnx.relu(self.second(nnx.relu(self.first(x))))
        return self.out(x.reshape(len(x), -1))


@nnx.jit
def train_step(model, optimizer, x, y):
    """One step; returns the loss before it."""

    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value


def main():
    """Trains, and prints how it goes."""
    images, labels = load_digits(return_X_y=True)
    images, labels = jnp.asarray(images.reshape(-1, 8, 8, 1) / 8 - 1), jnp.asarray(labels)
    train, test = jnp.split(jax.random.permutation(jax.random.key(0), len(labels)), [1400])

    model = Network(nnx.Rngs(0))
    nnx.update(model, agd_jax.orthogonal_init(jax.random.key(1), nnx.state(model, nnx.Param)))
    optimizer = nnx.Optimizer(model, agd_jax.agd(), wrt=nnx.Param)
    for epoch in range(EPOCHS):
        order = jax.random.permutation(jax.random.key(epoch), train).reshape(-1, BATCH)
        losses = [train_step(model, optimizer, images[i], labels[i]) for i in order]
        accuracy = (model(images[test]).argmax(axis=1) == labels[test]).mean()
        print(f"epoch {epoch + 1:2d}  loss {jnp.stack(losses).mean():.4f}  test {accuracy:.1%}")


if __name__ == "__main__":
    main()
