"""The optimisers that are compared, by name. A new one is a line in :data:`OPTIMIZERS`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

import agd_jax

Rate = jax.Array


class Optimizer(NamedTuple):
    """An optimiser with its settings.

    Attributes:
      make: ``(rate, steps) -> optimiser``, for a learning rate that is traced and the number of
        steps of the run.
      rates: the learning rates that are tried; one for what needs none.
      orthogonal: whether it starts from :func:`agd_jax.orthogonal_init`, not from Flax's weights.
      eval_params: ``(opt_state, params)`` to the parameters that are evaluated.
    """

    make: Callable[[Rate, int], optax.GradientTransformation]
    rates: tuple[float, ...] = (1.0,)
    orthogonal: bool = False
    eval_params: Callable[[Any, Any], Any] = lambda opt_state, params: params


def cosine(rate: Rate, steps: int) -> Callable[[jax.Array], jax.Array]:
    """Returns a schedule: linear over the first twentieth of the steps, then a cosine to zero."""
    warmup = max(1, steps // 20)

    def schedule(step: jax.Array) -> jax.Array:
        falling = 0.5 * (1 + jnp.cos(jnp.pi * (step - warmup) / max(1, steps - warmup)))
        return rate * jnp.where(step < warmup, (step + 1) / warmup, falling)

    return schedule


ADAM = (3e-4, 1e-3, 3e-3, 1e-2)
MUON = (5e-3, 1e-2, 2e-2, 5e-2)

OPTIMIZERS = {
    "agd": Optimizer(lambda rate, steps: agd_jax.agd(), orthogonal=True),
    "sgd": Optimizer(lambda rate, steps: optax.sgd(rate, momentum=0.9), (0.003, 0.01, 0.03, 0.1)),
    "adamw": Optimizer(lambda rate, steps: optax.adamw(rate), ADAM),
    "adamw_cosine": Optimizer(lambda rate, steps: optax.adamw(cosine(rate, steps), b2=0.99), ADAM),
    "muon": Optimizer(lambda rate, steps: contrib.muon(rate), MUON),
    "muon_cosine": Optimizer(lambda rate, steps: contrib.muon(cosine(rate, steps)), MUON),
    # The setting of AlgoPerf's winner.
    "schedule_free_adamw": Optimizer(
        lambda rate, steps: contrib.schedule_free_adamw(
            0.0025,
            warmup_steps=max(1, steps // 20),
            b1=0.9,
            b2=0.9955159689799007,
            weight_decay=0.08121616522670176,
        ),
        eval_params=contrib.schedule_free_eval_params,
    ),
    "schedule_free_muon": Optimizer(
        lambda rate, steps: contrib.schedule_free(contrib.muon(0.02), 0.02, b1=0.9),
        eval_params=contrib.schedule_free_eval_params,
    ),
    "prodigy": Optimizer(lambda rate, steps: contrib.prodigy()),
    "dowg": Optimizer(lambda rate, steps: contrib.dowg()),
    "mechanic": Optimizer(lambda rate, steps: contrib.mechanize(optax.adamw(1.0))),
}
