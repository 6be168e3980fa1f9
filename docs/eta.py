"""Draws `eta.png`: loss and eta of a healthy run and of two sick ones. `python docs/eta.py`."""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from flax import nnx
from sklearn.datasets import load_digits

import agd_jax
from models.fcn import FCN

EPOCHS, BATCH = 20, 128


def fit(labels: jax.Array, images: jax.Array, gain: float) -> tuple[jax.Array, jax.Array]:
    """Returns the loss and eta of each step."""
    model = FCN((8, 8, 1), 10, depth=6, width=128, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model, nnx.Param)
    apply = lambda params, x: nnx.merge(graphdef, params)(x)
    geometry = agd_jax.geometry_of(apply, params, images[:1])
    params = agd_jax.orthogonal_init(jax.random.key(1), params, geometry)
    tx = agd_jax.agd(geometry=geometry, gain=gain)

    def loss_of(params, x, y):
        return jnp.mean((apply(params, x) - 10**0.5 * jax.nn.one_hot(y, 10)) ** 2)

    def step(carry, batch):
        params, opt_state = carry
        loss, grads = jax.value_and_grad(loss_of)(params, images[batch], labels[batch])
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), (loss, opt_state.eta)

    steps = len(images) // BATCH
    orders = [jax.random.permutation(jax.random.key(i), len(images)) for i in range(EPOCHS)]
    batches = jnp.concatenate([order[: steps * BATCH].reshape(steps, BATCH) for order in orders])
    _, measured = jax.lax.scan(step, (params, tx.init(params)), batches)
    return measured


def main() -> None:
    """Takes the three runs, and draws them."""
    images, labels = load_digits(return_X_y=True)
    images, labels = jnp.asarray(images.reshape(-1, 8, 8, 1) / 8 - 1), jnp.asarray(labels)
    shuffled = jax.random.permutation(jax.random.key(2), labels)
    runs = {
        "a healthy run": fit(labels, images, 1.0),
        "nothing to learn": fit(shuffled, images, 1.0),
        "steps that are too large": fit(labels, images, 30.0),
    }
    figure, axes = plt.subplots(2, 3, figsize=(9, 4), sharex=True, layout="constrained")
    for (title, (losses, etas)), (above, below) in zip(runs.items(), axes.T, strict=True):
        above.plot(losses, color="#1f77b4")
        above.set(title=title, yscale="log" if "large" in title else "linear")
        below.plot(etas, color="#d62728")
        below.set(xlabel="step", ylim=0)
    axes[0, 0].set_ylabel("training loss")
    axes[1, 0].set_ylabel("eta")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=100)


if __name__ == "__main__":
    main()
