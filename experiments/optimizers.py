"""The optimisers that are compared, by name. A new one is a line in :data:`OPTIMIZERS`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

import agd_jax
from agd_jax.optimizer import MOMENTUM
from experiments import variants

Schedule = Callable[[jax.Array], jax.Array]


class Optimizer(NamedTuple):
    """An optimiser with its settings.

    Attributes:
      make: ``(rate, steps, **settings) -> optimiser``, for a learning rate that is traced and the
        number of steps of the run; that of AGD is given a ``geometry`` too.
      settings: its other arguments, as JSON values: part of the key of each run.
      rates: the learning rates that are tried, rising; one for what needs none.
      geometry: whether it is told how parameters are used.
      orthogonal: whether it starts from :func:`agd_jax.orthogonal_init`, not from Flax's weights.
      averaged: ``(opt_state, params)`` to the weights that are evaluated, if others.
    """

    make: Callable[..., optax.GradientTransformation]
    settings: Mapping[str, Any] = {}
    rates: tuple[float, ...] = (1.0,)
    geometry: bool = False
    orthogonal: bool = False
    averaged: Callable[[Any, Any], Any] | None = None

    def create(
        self, rate: jax.Array, steps: int, geometry: agd_jax.Geometry
    ) -> optax.GradientTransformation:
        """Returns the optimiser, for a learning rate, a number of steps and a network."""
        known = {"geometry": geometry} if self.geometry else {}
        return self.make(rate, steps, **self.settings, **known)


def cosine(rate: jax.Array, steps: int, warmup: float) -> Schedule:
    """Returns a schedule: linear over a part of the steps, then a cosine to zero."""
    first = max(1, round(warmup * steps))

    def schedule(step: jax.Array) -> jax.Array:
        falling = 0.5 * (1 + jnp.cos(jnp.pi * (step - first) / max(1, steps - first)))
        return rate * jnp.where(step < first, (step + 1) / first, falling)

    return schedule


def without_rate(make: Callable[..., Any]) -> Callable[..., Any]:
    """Returns how an optimiser is made that needs neither a learning rate nor the steps."""
    return lambda rate, steps, **settings: make(**settings)


def constant(make: Callable[..., Any]) -> Callable[..., Any]:
    """Returns how an optimiser is made with a constant learning rate."""
    return lambda rate, steps, **settings: make(rate, **settings)


def scheduled(make: Callable[..., Any]) -> Callable[..., Any]:
    """Returns how an optimiser is made with warm-up and cosine decay."""
    return lambda rate, steps, warmup, **settings: make(cosine(rate, steps, warmup), **settings)


def muon(rate: float | jax.Array | Schedule, adam_share: float, **settings: Any) -> Any:
    """Returns Muon for matrices and kernels inside of a network, and Adam for all else.

    Args:
      rate: the learning rate of Muon, or its schedule.
      adam_share: the learning rate of Adam, as a part of Muon's.
      settings: other arguments of ``contrib.muon``.
    """
    adam = (lambda step: adam_share * rate(step)) if callable(rate) else adam_share * rate
    return contrib.muon(
        rate, adam_learning_rate=adam, muon_weight_dimension_numbers=_matrices, **settings
    )


def _matrices(params: Any) -> Any:
    """Says which axes of a parameter Muon takes as rows and columns, None where Adam is used."""

    def dimensions(path: Any, param: jax.Array) -> contrib.MuonDimensionNumbers | None:
        names = jax.tree_util.keystr(path)
        if param.ndim < 2 or any(name in names for name in ("head", "embed", "positions", "token")):
            return None
        return contrib.MuonDimensionNumbers(tuple(range(param.ndim - 1)), param.ndim - 1)

    return jax.tree_util.tree_map_with_path(dimensions, params)


def schedule_free_adamw(
    rate: jax.Array, steps: int, *, own_rate: float, warmup: float, **settings: Any
) -> Any:
    """Returns schedule-free AdamW at a rate of its own, with warm-up over a part of the steps."""
    warmup_steps = max(1, round(warmup * steps))
    return contrib.schedule_free_adamw(own_rate, warmup_steps=warmup_steps, **settings)


def schedule_free_muon(
    rate: jax.Array, steps: int, *, own_rate: float, b1: float, **settings: Any
) -> Any:
    """Returns schedule-free averaging around :func:`muon`, at a rate of its own."""
    return contrib.schedule_free(muon(own_rate, **settings), own_rate, b1=b1)


def agd(
    revision: int,
    geometry: agd_jax.Geometry,
    depth: Literal["effective", "tensors"] = "effective",
    mass: float | None = None,
    start: str = "orthogonal",
    average: bool = False,
    **settings: Any,
) -> Any:
    """Returns AGD, whose step is shared out by the effective depth or the number of tensors.

    Args:
      revision: for the key of a run alone.
      geometry: how parameters are used.
      depth: what the step is shared out by.
      mass: the mass of offsets and scales, if another.
      start: what it starts from, for the key of a run alone.
      average: whether its weights are averaged.
      settings: other arguments of ``agd_jax.agd``.
    """
    known = geometry if depth == "effective" else geometry.by_tensors()
    if mass is not None:
        known = known.with_mass(mass)
    tx = agd_jax.agd(geometry=known, **settings)
    return agd_jax.averaged(tx) if average else tx


# A higher one has the runs of AGD taken again: when it takes other steps than before.
REVISION = 3


def of_agd(make: Callable[..., Any] = agd, **settings: Any) -> Optimizer:
    """Returns AGD with some settings, from orthogonal weights unless they say otherwise."""
    # All variants average.
    averages = settings.get("average", make is not agd)
    return Optimizer(
        without_rate(make),
        {"revision": REVISION, **settings},
        geometry=True,
        orthogonal=settings.get("start", "orthogonal") == "orthogonal",
        averaged=agd_jax.averaged_params if averages else None,
    )


ADAM = (3e-4, 1e-3, 3e-3)
MUON = (3e-3, 1e-2, 3e-2)

OPTIMIZERS = {
    "agd": of_agd(),
    # The paper's share of each layer, whatever the network.
    "agd_tensors": of_agd(depth="tensors"),
    "agd_mass_one": of_agd(mass=1.0),
    "agd_own_start": of_agd(start="flax"),
    "agd_averaged": of_agd(average=True),
    # The default, in the key too, so that another one has the runs taken again.
    "agd_spectral": of_agd(norm="spectral", momentum=MOMENTUM),
    "agd_spectral_averaged": of_agd(norm="spectral", momentum=MOMENTUM, average=True),
    "sgd": Optimizer(constant(optax.sgd), {"momentum": 0.9}, (3e-3, 1e-2, 3e-2)),
    "adam": Optimizer(constant(optax.adam), rates=ADAM),
    "adamw": Optimizer(constant(optax.adamw), {"weight_decay": 1e-4}, ADAM),
    "adamw_cosine": Optimizer(
        scheduled(optax.adamw), {"warmup": 0.05, "b2": 0.99, "weight_decay": 1e-4}, ADAM
    ),
    "muon": Optimizer(constant(muon), {"adam_share": 0.15}, MUON),
    "muon_cosine": Optimizer(scheduled(muon), {"warmup": 0.05, "adam_share": 0.15}, MUON),
    # The settings of the winner of AlgoPerf's self-tuning track.
    "schedule_free_adamw": Optimizer(
        schedule_free_adamw,
        {
            "own_rate": 0.0025,
            "warmup": 0.02,
            "b1": 0.9,
            "b2": 0.9955159689799007,
            "weight_decay": 0.08121616522670176,
        },
        averaged=contrib.schedule_free_eval_params,
    ),
    # Near to SF-NorMuon (arXiv:2605.23061) and AMUSE (arXiv:2605.22432): momentum before the
    # matrix is orthogonalised, and averaged iterates. The momentum of Adam is the averaging.
    "schedule_free_muon": Optimizer(
        schedule_free_muon,
        {"own_rate": 0.02, "b1": 0.9, "adam_share": 0.15, "adam_b1": 0.0},
        averaged=contrib.schedule_free_eval_params,
    ),
    "prodigy": Optimizer(without_rate(contrib.prodigy)),
    "dowg": Optimizer(without_rate(contrib.dowg)),
    "mechanic": Optimizer(without_rate(lambda: contrib.mechanize(optax.adamw(1.0)))),
}

# What was tried, before the momentum was chosen.
library = functools.partial(of_agd, norm="spectral", momentum=0.95, average=True)
variant = functools.partial(of_agd, variants.spectral, momentum=0.95)
between = functools.partial(of_agd, variants.between, momentum=0.95)
VARIANTS = {
    "v_momentum_95": library(),
    "v_frobenius": library(norm="frobenius"),
    "v_mass_one": library(mass=1.0),
    "v_mass_third": library(mass=1 / 3),
    "v_mass_thirtieth": library(mass=1 / 30),
    "v_half": library(gain=0.5),
    "v_twice": library(gain=2.0),
    "v_momentum_8": library(momentum=0.8),
    "v_momentum_98": library(momentum=0.98),
    "v_free": variant(growth="free"),
    "v_never": variant(growth="never"),
    "v_tables_third": variant(tables=1 / 3),
    "v_head_third": variant(ends=1 / 3),
    "v_head_three": variant(ends=3.0),
    "v_rows": variant(rows=True),
    "v_nuclear": variant(nuclear=True),
    "v_distance": variant(distance=True),
    "v_decay": variant(decay=0.1),
    "v_relative": variant(relative=True),
    "v_between_slow": between(power=0.1),
    "v_between": between(power=0.5),
}
OPTIMIZERS |= VARIANTS
