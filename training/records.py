"""The records of a run: typed here, and checked when they are read from JSON."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


@dataclass(frozen=True)
class EpochRecord:
    """One epoch: a line of ``metrics.jsonl``.

    Attributes:
      epoch: the number of the epoch, counted from 1.
      step: the number of steps taken by the end of the epoch.
      train_loss: the mean loss of the training batches, each before its step.
      train_accuracy: the accuracy on the training batches, 0 to 1, each before its step.
      test_loss: the mean loss over the test set at the end of the epoch.
      test_accuracy: the accuracy over the test set, 0 to 1.
      eta: the mean of eta, the automatic learning rate.
      eta_min: the smallest eta.
      eta_max: the largest eta.
      gradient_summary: the mean gradient summary G.
      seconds: the time that the training steps took, in seconds.
      images_per_second: the number of training images per second of that time.
      unreadable: the number of images that could not be read; only for streamed data.
      plain_test_loss: the mean loss over the test set of the network without averaging; only with
        ``--average``, where ``test_loss`` and ``test_accuracy`` are those of the averaged network.
      plain_test_accuracy: its accuracy over the test set, 0 to 1.
    """

    epoch: int
    step: int
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    eta: float
    eta_min: float
    eta_max: float
    gradient_summary: float
    seconds: float
    images_per_second: float
    unreadable: int | None = None
    plain_test_loss: float | None = None
    plain_test_accuracy: float | None = None

    def to_json(self) -> dict[str, int | float]:
        """Returns the fields by name, without those that do not apply."""
        fields = dataclasses.asdict(self)
        return {name: value for name, value in fields.items() if value is not None}


def best(records: Sequence[EpochRecord]) -> EpochRecord:
    """Returns the first record with the highest test accuracy, of one record or more."""
    # NaN, where no test image could be read, ranks below everything.
    return max(records, key=lambda r: -1 if math.isnan(r.test_accuracy) else r.test_accuracy)


def best_step(records: Sequence[EpochRecord], steps: set[int]) -> int | None:
    """Returns the given step that ended the epoch of best test accuracy; None if none ended one."""
    ended = [record for record in records if record.step in steps]
    return best(ended).step if ended else None


def from_json(cls: type[T], fields: object) -> T:
    """Builds a dataclass from a JSON object, which may come from anyone.

    Raises:
      ValueError: if a field is missing, unknown or of another type.
    """
    if not isinstance(fields, dict):
        raise ValueError(f"is {type(fields).__name__} and no object of JSON")
    hints = get_type_hints(cls)
    for name, value in fields.items():
        if name not in hints or not _fits(value, hints[name]):
            raise ValueError(f"has {name}={value!r}, which is unknown or of another type")
    try:
        return cls(**fields)
    except TypeError as error:  # A field is missing.
        raise ValueError(str(error)) from error


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, each) for each in get_args(hint))
    if get_origin(hint) is tuple:
        hints = get_args(hint)
        return (
            isinstance(value, tuple) and len(value) == len(hints) and all(map(_fits, value, hints))
        )
    if isinstance(value, bool):  # Which Python counts among the whole numbers.
        return hint is bool
    # JSON does not tell whole numbers from real ones.
    return isinstance(value, int | float if hint is float else get_origin(hint) or hint)
