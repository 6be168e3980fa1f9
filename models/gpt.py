"""A small language model, in the form of GPT-2 without biases in its matrices."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.transformer import Block


class GPT(nnx.Module):
    """Embeds tokens and positions, applies ``depth`` causal blocks, and predicts the next token."""

    def __init__(
        self,
        vocabulary: int,
        length: int,
        *,
        depth: int = 4,
        width: int = 128,
        heads: int = 4,
        dtype: jax.typing.DTypeLike = jnp.float32,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        start = nnx.initializers.normal(0.02)
        self.tokens = nnx.Embed(vocabulary, width, embedding_init=start, **types)
        self.positions = nnx.Embed(length, width, embedding_init=start, **types)
        self.blocks = nnx.List(Block(width, heads, causal=True, **types) for _ in range(depth))
        self.norm = nnx.LayerNorm(width, **types)
        self.head = nnx.Linear(width, vocabulary, use_bias=False, **types)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps integers ``(batch, length)`` to logits ``(batch, length, vocabulary)``."""
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
