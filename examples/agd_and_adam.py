"""AGD for the matrices of a network, Adam for its biases and norms."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import load_digits

import agd_jax

EPOCHS, BATCH = 20, 100


class Network(nnx.Module):
    """Dense layers with all the parts that AGD's theory leaves out."""

    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(64, 256, rngs=rngs)
        self.norm = nnx.LayerNorm(256, rngs=rngs)
        self.out = nnx.Linear(256, 10, rngs=rngs)

    def __call__(self, x):
        """Maps ``(batch, 64)`` to ``(batch, 10)``."""
        return self.out(nnx.relu(self.norm(self.hidden(x))))


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
    images, labels = jnp.asarray(images / 8 - 1), jnp.asarray(labels)
    train, test = jnp.split(jax.random.permutation(jax.random.key(0), len(labels)), [1400])

    model = Network(nnx.Rngs(0))
    nnx.update(model, agd_jax.orthogonal_init(jax.random.key(1), nnx.state(model, nnx.Param)))
    parts = {"matrix": agd_jax.agd(), "rest": optax.adam(1e-3)}
    label = lambda params: jax.tree.map(lambda p: "matrix" if p.ndim in (2, 4) else "rest", params)
    optimizer = nnx.Optimizer(model, optax.partition(parts, label), wrt=nnx.Param)
    for epoch in range(EPOCHS):
        order = jax.random.permutation(jax.random.key(epoch), train).reshape(-1, BATCH)
        losses = [train_step(model, optimizer, images[i], labels[i]) for i in order]
        accuracy = (model(images[test]).argmax(axis=1) == labels[test]).mean()
        print(f"epoch {epoch + 1:2d}  loss {jnp.stack(losses).mean():.4f}  test {accuracy:.1%}")


if __name__ == "__main__":
    main()
