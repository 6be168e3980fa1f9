"""The network that a config asks for, without anything that trains it."""

import jax.numpy as jnp
from flax import nnx

import models
from training.config import TrainConfig

# --precision -> dtype of the network's arithmetic, and of everything else.
DTYPES = {
    "f32": (jnp.float32, jnp.float32),
    "bf16": (jnp.bfloat16, jnp.float32),
    "f64": (jnp.float64, jnp.float64),
}


def create(config: TrainConfig) -> nnx.Module:
    """Builds the network with Flax's own starting weights."""
    dtype, param_dtype = DTYPES[config.precision]
    options = {"depth": config.depth, "width": config.width} if config.arch == "fcn" else {}
    return models.create(
        config.arch,
        config.spec.image_shape,
        config.spec.num_classes,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=nnx.Rngs(0),
        **options,
    )
