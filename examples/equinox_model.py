"""An Equinox model of your own, whose layers have their outputs first: the program says so."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import agd_jax

EPOCHS, BATCH = 20, 100


def network(key):
    """Two convolutions and a dense layer: maps ``(1, 8, 8)`` to ``(10,)``."""
    keys = jax.random.split(key, 3)
    return eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(1, 16, 3, padding=1, use_bias=False, key=keys[0]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Conv2d(16, 32, 3, stride=2, padding=1, use_bias=False, key=keys[1]),
            eqx.nn.Lambda(lambda x: jax.nn.relu(x).ravel()),
            eqx.nn.Linear(32 * 4 * 4, 10, use_bias=False, key=keys[2]),
        ]
    )


def main():
    """Trains, and prints how it goes."""
    images, labels = load_digits(return_X_y=True)
    images, labels = jnp.asarray(images.reshape(-1, 1, 8, 8) / 8 - 1), jnp.asarray(labels)
    train, test = jnp.split(jax.random.permutation(jax.random.key(0), len(labels)), [1400])

    params, static = eqx.partition(network(jax.random.key(1)), eqx.is_inexact_array)
    apply = lambda params, x: jax.vmap(eqx.combine(params, static))(x)
    geometry = agd_jax.geometry_of(apply, params, images[:1])
    print(geometry)
    params = agd_jax.orthogonal_init(jax.random.key(2), params, geometry)
    tx = agd_jax.agd(geometry=geometry)
    opt_state = tx.init(params)

    @jax.jit
    def train_step(params, opt_state, x, y):
        loss = lambda p: optax.softmax_cross_entropy_with_integer_labels(apply(p, x), y).mean()
        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    for epoch in range(EPOCHS):
        losses = []
        for i in jax.random.permutation(jax.random.key(epoch), train).reshape(-1, BATCH):
            params, opt_state, loss = train_step(params, opt_state, images[i], labels[i])
            losses.append(loss)
        accuracy = (apply(params, images[test]).argmax(axis=1) == labels[test]).mean()
        print(f"epoch {epoch + 1:2d}  loss {jnp.stack(losses).mean():.4f}  test {accuracy:.1%}")


if __name__ == "__main__":
    main()
