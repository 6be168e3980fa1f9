"""A GPT in Flax Linen learns to sort; its four blocks, a scan over stacked weights, are layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import agd_jax

STEPS, BATCH, LENGTH, DIGITS, WIDTH = 200, 64, 8, 10, 64


class Block(nn.Module):
    """Causal attention and two dense layers, each behind a norm and added to the stream."""

    @nn.compact
    def __call__(self, x, _):
        """Maps ``(batch, tokens, WIDTH)`` to the same; scan asks for a second result."""
        mask = nn.make_causal_mask(x[..., 0])
        x += nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(x), mask=mask)
        return x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x)))), None


class GPT(nn.Module):
    """Predicts sorted digits, each from all digits and the sorted ones before it."""

    @nn.compact
    def __call__(self, digits):
        """Maps integers ``(batch, LENGTH)`` to logits ``(batch, LENGTH, DIGITS)``."""
        tokens = jnp.concatenate([digits, jnp.sort(digits)[:, :-1]], axis=1)
        places = jnp.arange(tokens.shape[1])
        x = nn.Embed(DIGITS, WIDTH)(tokens) + nn.Embed(len(places), WIDTH)(places)
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        x, _ = nn.scan(Block, length=4, **axes)()(x, None)
        return nn.Dense(DIGITS)(nn.LayerNorm()(x))[:, LENGTH - 1 :]


draw = lambda seed: jax.random.randint(jax.random.key(seed), (BATCH, LENGTH), 0, DIGITS)
apply, test = GPT().apply, draw(0)
params = GPT().init(jax.random.key(0), test)
tx = agd_jax.agd(geometry=agd_jax.geometry_of(apply, params, test), norm="spectral")
opt_state = tx.init(params)


@jax.jit
def train_step(params, opt_state, x):
    """One step; returns the loss before it."""
    entropy = optax.softmax_cross_entropy_with_integer_labels
    value, grads = jax.value_and_grad(lambda p: entropy(apply(p, x), jnp.sort(x)).mean())(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value


for step in range(1, STEPS + 1):
    params, opt_state, loss = train_step(params, opt_state, draw(step))
    if step % 20 == 0:
        accuracy = (apply(params, test).argmax(axis=-1) == jnp.sort(test)).mean()
        print(f"step {step}  loss {loss:.4f}  test {accuracy:.1%}")
