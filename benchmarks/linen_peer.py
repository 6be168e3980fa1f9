"""What `compile_ahead.py` compares with: an ImageNet step as Flax Linen's users write it.

ResNet-50 "v1.5" with scale and offset in BatchNorm and a bias in its last layer, cross-entropy,
and SGD with Nesterov's momentum, as in Flax's own ImageNet example; under ``jit``, which makes
BatchNorm's statistics those of the whole batch. That example's weight decay, which would only add
to what is compared, is left out.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

BLOCKS = (3, 4, 6, 3)


class Bottleneck(nn.Module):
    """Convolutions of 1x1, 3x3 and 1x1, each with BatchNorm, beside a shortcut."""

    width: int
    stride: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``(batch, height, width, d_in)`` to ``(batch, height', width', 4 width)``."""
        y = nn.relu(self.norm()(self.conv(self.width, (1, 1))(x)))
        y = nn.relu(self.norm()(self.conv(self.width, (3, 3), strides=self.stride)(y)))
        # A block begins as the identity.
        scale_init = nn.initializers.zeros_init()
        y = self.norm(scale_init=scale_init)(self.conv(4 * self.width, (1, 1))(y))
        if x.shape != y.shape:
            x = self.norm()(self.conv(4 * self.width, (1, 1), strides=self.stride)(x))
        return nn.relu(x + y)


class ResNet50(nn.Module):
    """ResNet-50, with its stride in the 3x3 convolutions."""

    dtype: Any

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps ``(batch, height, width, 3)`` to logits ``(batch, 1000)``."""
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = functools.partial(
            nn.BatchNorm, use_running_average=False, momentum=0.9, epsilon=1e-5, dtype=self.dtype
        )
        x = nn.relu(norm()(conv(64, (7, 7), strides=2, padding=3)(images)))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for stage, count in enumerate(BLOCKS):
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                x = Bottleneck(64 << stage, stride, conv, norm)(x)
        return nn.Dense(1000, dtype=self.dtype)(x.mean((1, 2)))


@struct.dataclass
class State:
    """What training changes."""

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any


def build(
    image_size: int, dtype: Any
) -> tuple[State, Callable[..., tuple[State, dict[str, jax.Array]]]]:
    """Returns the shapes of the state, and the step ``(state, images, labels)``.

    Args:
      image_size: the side of the images.
      dtype: what the network computes in.
    """
    network = ResNet50(dtype)
    tx = optax.sgd(0.1, momentum=0.9, nesterov=True)

    def start(key: jax.Array) -> State:
        variables = network.init(key, jnp.zeros((1, image_size, image_size, 3), dtype))
        params = variables["params"]
        step = jnp.zeros([], jnp.int32)
        return State(step, params, variables["batch_stats"], tx.init(params))

    def step(
        state: State, images: jax.Array, labels: jax.Array
    ) -> tuple[State, dict[str, jax.Array]]:
        def objective(params: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, changed = network.apply(variables, images, mutable=["batch_stats"])
            losses = optax.softmax_cross_entropy(logits, jax.nn.one_hot(labels, 1000))
            return losses.mean(), (logits, changed["batch_stats"])

        gradient = jax.value_and_grad(objective, has_aux=True)
        (loss, (logits, batch_stats)), grads = gradient(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        measured = {"loss": loss, "accuracy": jnp.mean(jnp.argmax(logits, -1) == labels)}
        return State(state.step + 1, params, batch_stats, opt_state), measured

    return jax.eval_shape(start, jax.random.key(0)), step
