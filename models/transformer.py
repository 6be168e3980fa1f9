"""The block of the transformers."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class Block(nnx.Module):
    """Attention and a perceptron, each of normalised input and added to it (pre-norm)."""

    def __init__(self, width: int, heads: int, causal: bool, **types: Any):
        linear = {"use_bias": False, **types}
        self.heads, self.causal = heads, causal
        self.attention_norm = nnx.LayerNorm(width, **types)
        self.query = nnx.Linear(width, width, **linear)
        self.key = nnx.Linear(width, width, **linear)
        self.value = nnx.Linear(width, width, **linear)
        self.out = nnx.Linear(width, width, **linear)
        self.norm = nnx.LayerNorm(width, **types)
        self.up = nnx.Linear(width, 4 * width, **linear)
        self.down = nnx.Linear(4 * width, width, **linear)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``(batch, length, width)`` to the same shape."""
        h = self.attention_norm(x)

        def split(y: jax.Array) -> jax.Array:
            return y.reshape(*y.shape[:2], self.heads, -1)

        query, key, value = split(self.query(h)), split(self.key(h)), split(self.value(h))
        # Not nnx.dot_product_attention, whose softmax is float32 even of float64.
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(query.shape[-1])
        scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
        if self.causal:
            scores = jnp.where(jnp.tri(x.shape[1], dtype=bool), scores, -jnp.inf)
        attention = jax.nn.softmax(scores).astype(value.dtype)
        attended = jnp.einsum("bhqk,bkhd->bqhd", attention, value)
        x = x + self.out(attended.reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.norm(x))))
