"""A vision transformer in Flax NNX: attention, norms, biases and positions, as they are."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import load_digits

import agd_jax

EPOCHS, BATCH, WIDTH, TOKENS = 30, 100, 64, 16


class ViT(nnx.Module):
    """Patches of 2 x 2 pixels, and two blocks of attention and dense layers behind norms."""

    def __init__(self, rngs):
        self.patches = nnx.Conv(1, WIDTH, (2, 2), strides=2, rngs=rngs)
        self.positions = nnx.Param(jax.random.normal(rngs.params(), (TOKENS, WIDTH)))
        attention = lambda: nnx.MultiHeadAttention(4, WIDTH, decode=False, rngs=rngs)
        norm, linear = lambda: nnx.LayerNorm(WIDTH, rngs=rngs), lambda *d: nnx.Linear(*d, rngs=rngs)
        hidden = lambda: nnx.Sequential(norm(), linear(WIDTH, 256), nnx.gelu, linear(256, WIDTH))
        self.attention = nnx.List(nnx.Sequential(norm(), attention()) for _ in range(2))
        self.hidden = nnx.List(hidden() for _ in range(2))
        self.out = linear(WIDTH, 10)

    def __call__(self, x):
        """Maps ``(batch, 8, 8, 1)`` to ``(batch, 10)``."""
        x = self.patches(x).reshape(len(x), TOKENS, WIDTH) + self.positions
        for attention, hidden in zip(self.attention, self.hidden, strict=True):
            x += attention(x)
            x += hidden(x)
        return self.out(x.mean(axis=1))


@nnx.jit
def train_step(model, optimizer, x, y):
    """One step; returns the loss before it."""
    loss = lambda m: optax.softmax_cross_entropy_with_integer_labels(m(x), y).mean()
    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value


images, labels = load_digits(return_X_y=True)
images, labels = jnp.asarray(images.reshape(-1, 8, 8, 1) / 8 - 1), jnp.asarray(labels)
train, test = jnp.split(jax.random.permutation(jax.random.key(0), len(labels)), [1400])

model = ViT(nnx.Rngs(0))
graphdef, params = nnx.split(model)
geometry = agd_jax.geometry_of(lambda p, x: nnx.merge(graphdef, p)(x), params, images[:1])
print(geometry)
optimizer = nnx.Optimizer(model, agd_jax.agd(geometry=geometry), wrt=nnx.Param)
for epoch in range(EPOCHS):
    order = jax.random.permutation(jax.random.key(epoch), train).reshape(-1, BATCH)
    losses = [train_step(model, optimizer, images[i], labels[i]) for i in order]
    accuracy = (model(images[test]).argmax(axis=1) == labels[test]).mean()
    print(f"epoch {epoch + 1:2d}  loss {jnp.stack(losses).mean():.4f}  test {accuracy:.1%}")
