"""Automatic gradient descent (AGD) for JAX: training without a learning rate.

>>> import agd_jax, jax, jax.numpy as jnp
>>> params = agd_jax.orthogonal_init(jax.random.key(0), {'kernel': jnp.zeros((4, 8))})
>>> tx = agd_jax.agd()
>>> opt_state = tx.init(params)

Source: Bernstein, Mingard, Huang, Azizan, Yue, *Automatic Gradient Descent: Deep Learning
without Hyperparameters*, 2023, https://arxiv.org/abs/2304.05187.
"""

from agd_jax.averaging import averaged, averaged_params
from agd_jax.geometry import Geometry, geometry_of
from agd_jax.initialization import orthogonal_init
from agd_jax.optimizer import AgdState, agd

__all__ = [
    "AgdState",
    "Geometry",
    "agd",
    "averaged",
    "averaged_params",
    "geometry_of",
    "orthogonal_init",
]
__version__ = "0.2.0"
